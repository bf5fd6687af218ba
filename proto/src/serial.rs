//! Serial numbers: 16 bytes, 48 bits of millisecond time first and 80 random bits after, so that
//! they are unguessable and yet sort by time of issue.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// A certificate's serial number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Serial([u8; 16]);

/// Not a serial of this CA.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("not a serial number: 32 hexadecimal digits (16 bytes) are wanted")]
pub struct SerialError;

impl Serial {
    /// Length in bytes.
    pub const LEN: usize = 16;

    /// Puts a serial together. The time's top bit is clear until the year 6429, so the DER INTEGER
    /// stays positive (RFC 5280 4.1.2.2).
    #[must_use]
    pub fn new(unix_ms: u64, random: [u8; 10]) -> Self {
        let mut bytes = [0; 16];
        bytes[..6].copy_from_slice(&unix_ms.to_be_bytes()[2..]);
        bytes[6..].copy_from_slice(&random);
        Self(bytes)
    }

    /// The bytes, big-endian.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// When the CA issued it, in milliseconds since 1970: notBefore is backdated, this is not.
    #[must_use]
    pub fn unix_ms(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes[2..].copy_from_slice(&self.0[..6]);
        u64::from_be_bytes(bytes)
    }

    /// From bytes on the wire, or the content of a DER INTEGER (which drops leading zeros).
    ///
    /// # Errors
    /// Longer than 16 bytes, or empty.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, SerialError> {
        if bytes.is_empty() || bytes.len() > Self::LEN {
            return Err(SerialError);
        }
        let mut padded = [0; 16];
        padded[Self::LEN - bytes.len()..].copy_from_slice(bytes);
        Ok(Self(padded))
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Serial {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, SerialError> {
        // As OpenSSL prints it, with colons, or as we do.
        let digits: String = text.chars().take(64).filter(|c| *c != ':').collect();
        let bytes = hex::decode(digits).map_err(|_| SerialError)?;
        if bytes.len() != Self::LEN {
            return Err(SerialError);
        }
        Self::from_slice(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_comes_first_and_the_number_is_positive() {
        let early = Serial::new(1_000, [0xff; 10]);
        let late = Serial::new(1_001, [0; 10]);
        assert!(early < late);
        assert_eq!(early.unix_ms(), 1_000);
        assert_eq!(Serial::new((1 << 47) - 1, [0; 10]).as_bytes()[0], 0x7f);
    }

    #[test]
    fn text_round_trips_with_and_without_colons() {
        let serial = Serial::new(1_764_000_000_000, [7; 10]);
        assert_eq!(serial.to_string().parse(), Ok(serial));
        let colons = serial.as_bytes().map(|b| format!("{b:02X}")).join(":");
        assert_eq!(colons.parse(), Ok(serial));
        assert!("00".parse::<Serial>().is_err());
    }
}
