//! From what TLS says to the word we use. It judges nothing.

use rustls::{AlertDescription, CertificateError, Error};

use super::reason::{Reason, Refused};

/// Why a handshake failed.
#[allow(clippy::wildcard_enum_match_arm, reason = "rustls' enums, not ours")]
pub(crate) fn of_tls(error: &Error) -> Refused {
    let reason = match error {
        Error::InvalidCertificate(error) => return of_certificate(error),
        Error::NoCertificatesPresented => Reason::NoCertificate,
        Error::AlertReceived(alert) => return of_alert(*alert),
        _ => Reason::NoTls,
    };
    Refused::new(reason, error.to_string())
}

#[allow(clippy::wildcard_enum_match_arm, reason = "rustls' enum, not ours")]
fn of_certificate(error: &CertificateError) -> Refused {
    let reason = match error {
        CertificateError::Other(other) => match other.0.downcast_ref::<Refused>() {
            Some(refused) => return refused.clone(),
            None => Reason::WrongName,
        },
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => Reason::Expired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Reason::NotYetValid
        }
        CertificateError::Revoked => Reason::Revoked,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            Reason::AddressMismatch
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Reason::UnknownIssuer,
        _ => Reason::WrongName,
    };
    Refused::new(reason, error.to_string())
}

/// What the peer thinks of our certificate.
#[allow(clippy::wildcard_enum_match_arm, reason = "rustls' enum, not ours")]
fn of_alert(alert: AlertDescription) -> Refused {
    let reason = match alert {
        AlertDescription::CertificateExpired => Reason::Expired,
        AlertDescription::CertificateRevoked => Reason::Revoked,
        AlertDescription::UnknownCA => Reason::UnknownIssuer,
        AlertDescription::CertificateRequired => Reason::NoCertificate,
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => {
            Reason::WrongName
        }
        _ => Reason::NoTls,
    };
    Refused::new(reason, format!("the peer refuses this node's certificate: alert {alert:?}"))
}
