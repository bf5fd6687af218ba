//! Keys and the certificates made with them: what may stand in a certificate ([`profile`]), what is
//! taken from a request ([`csr`]), who signs ([`signer`]), who signs for whom ([`authority`]), and
//! how keys lie on disk ([`kek`]).

pub mod authority;
pub mod crl;
pub mod csr;
pub mod kek;
pub mod profile;
pub mod random;
pub mod signer;
