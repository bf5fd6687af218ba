//! Compiles the .proto files with protox, so that no protoc is needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const FILES: [&str; 4] = [
    "raymtls/v1/types.proto",
    "raymtls/v1/enrollment.proto",
    "raymtls/v1/node.proto",
    "raymtls/v1/admin.proto",
];

#[allow(clippy::disallowed_methods, reason = "a build script writes into OUT_DIR")]
fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("raymtls.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .skip_debug([
            "raymtls.v1.EnrollRequest",
            "raymtls.v1.EnrollRequest.credential",
            "raymtls.v1.CreateTokenResponse",
            "raymtls.v1.RayToken",
            "raymtls.v1.SyncResponse",
        ])
        .compile_fds(descriptors)?;
    Ok(())
}
