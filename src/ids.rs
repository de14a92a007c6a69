//! IDs of endpoints and domains, the token of virtual functions, and lists of the variants of enums.

use std::fmt;
use std::str::FromStr;

/// A device behind the IOMMU (virtio specification, section "IOMMU device", field `endpoint`).
///
/// For PCI functions it is `segment << 16 | bus << 8 | device << 3 | function`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(pub u32);

impl fmt::Display for EndpointId {
    /// As the address of the PCI function: an endpoint has one form in all messages. Every ID has such an address.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [_, _, bus, devfn] = self.0.to_be_bytes();
        let segment = self.0 >> 16;
        write!(
            f,
            "{segment:04x}:{bus:02x}:{:02x}.{}",
            devfn >> 3,
            devfn & 7
        )
    }
}

/// An address space that the guest created (virtio specification, field `domain`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainId(pub u32);

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The VF token of VFIO: a UUID, and a secret.
///
/// VFIO asks for it before it opens a virtual function whose physical function a VFIO driver holds, and before it opens a
/// physical function while virtual functions of it are open. The token is never shown: [`Debug`](fmt::Debug) hides it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VfToken([u8; 16]);

impl VfToken {
    /// The characters of a UUID.
    const LEN: usize = 36;
    /// The places of its hyphens.
    const HYPHENS: [usize; 4] = [8, 13, 18, 23];

    /// The bytes of the UUID, in the order of its text.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The UUID as a text of 36 characters. It must not reach a log or an error message.
    pub fn to_secret_text(self) -> String {
        let mut text: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        for place in Self::HYPHENS {
            text.insert(place, '-');
        }
        text
    }
}

/// Hides the token.
impl fmt::Debug for VfToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VfToken(..)")
    }
}

/// A text that is no UUID. The text is not kept: it may be a mistyped secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoUuid;

impl FromStr for VfToken {
    type Err = NoUuid;

    /// Reads `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`, as Linux does (`uuid_parse`).
    fn from_str(text: &str) -> Result<Self, NoUuid> {
        let is_uuid = text.len() == Self::LEN
            && text
                .bytes()
                .enumerate()
                .all(|(at, byte)| match Self::HYPHENS.contains(&at) {
                    true => byte == b'-',
                    false => byte.is_ascii_hexdigit(),
                });
        if !is_uuid {
            return Err(NoUuid);
        }
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        let number = u128::from_str_radix(&digits, 16).map_err(|_| NoUuid)?;
        Ok(Self(number.to_be_bytes()))
    }
}

/// Lists all variants of an enum without fields: `list_variants!(Kind: First, Second)` gives it
/// `COUNT`, `ALL` and `index`.
///
/// If the list lacks a variant, the code does not compile: `index` matches on the list alone. A plain `ALL`
/// array could lack a variant unnoticed, and an array of `COUNT` elements would have none for it.
macro_rules! list_variants {
    ($name:ident: $($variant:ident),+ $(,)?) => {
        impl $name {
            /// The number of variants.
            pub const COUNT: usize = Self::ALL.len();
            /// All variants, in the order of their declaration.
            pub const ALL: [Self; [$(Self::$variant),+].len()] = [$(Self::$variant),+];

            /// The index of this variant in [`Self::ALL`], below [`Self::COUNT`].
            pub const fn index(self) -> usize {
                enum Position {
                    $($variant),+
                }
                match self {
                    $(Self::$variant => Position::$variant as usize),+
                }
            }
        }
    };
}

pub(crate) use list_variants;

#[cfg(test)]
mod tests {
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Sparse {
        Low = 3,
        High = 90,
    }

    list_variants!(Sparse: Low, High);

    #[test]
    fn variants_are_counted_by_position_not_by_value() {
        assert_eq!(Sparse::ALL, [Sparse::Low, Sparse::High]);
        assert_eq!(Sparse::ALL.map(Sparse::index), [0, 1]);
        assert_eq!((Sparse::COUNT, Sparse::High as u8), (2, 90));
    }
}
