//! IDs of endpoints and domains, and lists of the variants of enums.

use std::fmt;

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
