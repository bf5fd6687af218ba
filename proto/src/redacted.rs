//! `Debug` for the generated messages that hold a secret: they name the message and print none of it.

use std::fmt;

use crate::v1;

macro_rules! redacted {
    ($($message:ty),+ $(,)?) => {$(
        impl fmt::Debug for $message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($message), "(..)"))
            }
        }
    )+};
}

redacted!(
    v1::EnrollRequest,
    v1::enroll_request::Credential,
    v1::CreateTokenResponse,
    v1::RayToken,
    v1::SyncResponse,
);
