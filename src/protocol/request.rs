//! Decoding the device-readable part of a request.

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::wire::{
    ReqAttach, ReqDetach, ReqMap, ReqProbe, ReqUnmap, VIRTIO_IOMMU_T_ATTACH, VIRTIO_IOMMU_T_DETACH,
    VIRTIO_IOMMU_T_MAP, VIRTIO_IOMMU_T_PROBE, VIRTIO_IOMMU_T_UNMAP,
};
use crate::address::{Gpa, Iova};
use crate::ids::{DomainId, EndpointId, list_variants};

/// The longest device-readable part of any request, in bytes (PROBE).
pub const MAX_REQUEST_LEN: usize = size_of::<ReqProbe>();

/// The types of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// `VIRTIO_IOMMU_T_ATTACH`
    Attach,
    /// `VIRTIO_IOMMU_T_DETACH`
    Detach,
    /// `VIRTIO_IOMMU_T_MAP`
    Map,
    /// `VIRTIO_IOMMU_T_UNMAP`
    Unmap,
    /// `VIRTIO_IOMMU_T_PROBE`
    Probe,
}

list_variants!(RequestKind: Attach, Detach, Map, Unmap, Probe);

impl RequestKind {
    /// The kind of a request that starts with these bytes, or `None` if its type is unknown.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        Self::from_number(*bytes.first()?)
    }

    const fn from_number(number: u8) -> Option<Self> {
        match number {
            VIRTIO_IOMMU_T_ATTACH => Some(Self::Attach),
            VIRTIO_IOMMU_T_DETACH => Some(Self::Detach),
            VIRTIO_IOMMU_T_MAP => Some(Self::Map),
            VIRTIO_IOMMU_T_UNMAP => Some(Self::Unmap),
            VIRTIO_IOMMU_T_PROBE => Some(Self::Probe),
            _ => None,
        }
    }

    /// The number of the type, `VIRTIO_IOMMU_T_*`.
    pub const fn number(self) -> u8 {
        match self {
            Self::Attach => VIRTIO_IOMMU_T_ATTACH,
            Self::Detach => VIRTIO_IOMMU_T_DETACH,
            Self::Map => VIRTIO_IOMMU_T_MAP,
            Self::Unmap => VIRTIO_IOMMU_T_UNMAP,
            Self::Probe => VIRTIO_IOMMU_T_PROBE,
        }
    }

    /// The length of the device-readable part in bytes.
    pub const fn request_len(self) -> usize {
        match self {
            Self::Attach => size_of::<ReqAttach>(),
            Self::Detach => size_of::<ReqDetach>(),
            Self::Map => size_of::<ReqMap>(),
            Self::Unmap => size_of::<ReqUnmap>(),
            Self::Probe => size_of::<ReqProbe>(),
        }
    }

    /// The name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attach => "attach",
            Self::Detach => "detach",
            Self::Map => "map",
            Self::Unmap => "unmap",
            Self::Probe => "probe",
        }
    }
}

/// A request as read from guest memory. No value is validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Attach an endpoint to a domain.
    Attach {
        /// Domain ID.
        domain: DomainId,
        /// Endpoint ID.
        endpoint: EndpointId,
        /// `VIRTIO_IOMMU_ATTACH_F_*`, including unknown bits.
        flags: u32,
        /// Whether the reserved field is zero, as it must be.
        reserved_is_zero: bool,
    },
    /// Detach an endpoint from a domain.
    Detach {
        /// Domain ID.
        domain: DomainId,
        /// Endpoint ID.
        endpoint: EndpointId,
    },
    /// Create a mapping.
    Map {
        /// Domain ID.
        domain: DomainId,
        /// First I/O virtual address.
        virt_start: Iova,
        /// Last I/O virtual address, inclusive; may be below `virt_start`.
        virt_end: Iova,
        /// First guest-physical address.
        phys_start: Gpa,
        /// `VIRTIO_IOMMU_MAP_F_*`, including unknown bits.
        flags: u32,
    },
    /// Remove mappings.
    Unmap {
        /// Domain ID.
        domain: DomainId,
        /// First I/O virtual address.
        virt_start: Iova,
        /// Last I/O virtual address, inclusive; may be below `virt_start`.
        virt_end: Iova,
    },
    /// Ask for an endpoint's properties.
    Probe {
        /// Endpoint ID.
        endpoint: EndpointId,
    },
}

/// The bytes are not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The type is none of `VIRTIO_IOMMU_T_*`, or there are no bytes.
    #[error("unknown request type")]
    UnknownType,
    /// There are fewer bytes than the request has.
    #[error("{} request of {have} bytes instead of {need}", kind.name())]
    TooShort {
        /// The kind, from the head.
        kind: RequestKind,
        /// The number of bytes that this kind has.
        need: usize,
        /// The number of bytes available.
        have: usize,
    },
}

impl Request {
    /// Decodes a request from its device-readable bytes. Ignores bytes after it.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let kind = RequestKind::of(bytes).ok_or(DecodeError::UnknownType)?;
        Ok(match kind {
            RequestKind::Attach => {
                let r: &ReqAttach = prefix(kind, bytes)?;
                Self::Attach {
                    domain: DomainId(r.domain.get()),
                    endpoint: EndpointId(r.endpoint.get()),
                    flags: r.flags.get(),
                    reserved_is_zero: r.reserved == [0; 4],
                }
            }
            RequestKind::Detach => {
                let r: &ReqDetach = prefix(kind, bytes)?;
                Self::Detach {
                    domain: DomainId(r.domain.get()),
                    endpoint: EndpointId(r.endpoint.get()),
                }
            }
            RequestKind::Map => {
                let r: &ReqMap = prefix(kind, bytes)?;
                Self::Map {
                    domain: DomainId(r.domain.get()),
                    virt_start: Iova(r.virt_start.get()),
                    virt_end: Iova(r.virt_end.get()),
                    phys_start: Gpa(r.phys_start.get()),
                    flags: r.flags.get(),
                }
            }
            RequestKind::Unmap => {
                let r: &ReqUnmap = prefix(kind, bytes)?;
                Self::Unmap {
                    domain: DomainId(r.domain.get()),
                    virt_start: Iova(r.virt_start.get()),
                    virt_end: Iova(r.virt_end.get()),
                }
            }
            RequestKind::Probe => {
                let r: &ReqProbe = prefix(kind, bytes)?;
                Self::Probe {
                    endpoint: EndpointId(r.endpoint.get()),
                }
            }
        })
    }

    /// The kind of this request.
    pub fn kind(&self) -> RequestKind {
        match self {
            Self::Attach { .. } => RequestKind::Attach,
            Self::Detach { .. } => RequestKind::Detach,
            Self::Map { .. } => RequestKind::Map,
            Self::Unmap { .. } => RequestKind::Unmap,
            Self::Probe { .. } => RequestKind::Probe,
        }
    }
}

fn prefix<T>(kind: RequestKind, bytes: &[u8]) -> Result<&T, DecodeError>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    let Ok((request, _)) = T::ref_from_prefix(bytes) else {
        return Err(DecodeError::TooShort {
            kind,
            need: size_of::<T>(),
            have: bytes.len(),
        });
    };
    Ok(request)
}

// The number of every kind must decode to that kind, and no request may be longer than the longest.
const _: () = {
    let mut rest: &[RequestKind] = &RequestKind::ALL;
    while let [kind, others @ ..] = rest {
        assert!(
            matches!(RequestKind::from_number(kind.number()), Some(k) if k.index() == kind.index())
        );
        assert!(kind.request_len() <= MAX_REQUEST_LEN);
        rest = others;
    }
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let mut map = vec![3, 0xff, 0xff, 0xff];
        map.extend_from_slice(&7u32.to_le_bytes());
        map.extend_from_slice(&0x1000u64.to_le_bytes());
        map.extend_from_slice(&0x1fffu64.to_le_bytes());
        map.extend_from_slice(&0xa000u64.to_le_bytes());
        map.extend_from_slice(&0x8000_0003u32.to_le_bytes());
        assert_eq!(
            Request::decode(&map),
            Ok(Request::Map {
                domain: DomainId(7),
                virt_start: Iova(0x1000),
                virt_end: Iova(0x1fff),
                phys_start: Gpa(0xa000),
                flags: 0x8000_0003,
            })
        );
        let mut attach = vec![1, 0, 0, 0];
        for field in [9u32, 0x30, 1, 0x0100_0000] {
            attach.extend_from_slice(&field.to_le_bytes());
        }
        assert_eq!(
            Request::decode(&attach),
            Ok(Request::Attach {
                domain: DomainId(9),
                endpoint: EndpointId(0x30),
                flags: 1,
                reserved_is_zero: false,
            })
        );
    }

    #[test]
    fn short_and_unknown_requests_are_distinguished() {
        assert_eq!(Request::decode(&[]), Err(DecodeError::UnknownType));
        assert_eq!(Request::decode(&[0; 72]), Err(DecodeError::UnknownType));
        assert_eq!(Request::decode(&[6; 72]), Err(DecodeError::UnknownType));
        for (kind, need) in RequestKind::ALL.into_iter().zip([20, 20, 36, 28, 72]) {
            let mut bytes = vec![0; need];
            bytes[0] = kind.number();
            assert_eq!(Request::decode(&bytes).map(|r| r.kind()), Ok(kind));
            assert_eq!(
                Request::decode(&bytes[..need - 1]),
                Err(DecodeError::TooShort {
                    kind,
                    need,
                    have: need - 1
                })
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_give_the_right_error(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            match Request::decode(&bytes) {
                Ok(request) => prop_assert_eq!(RequestKind::of(&bytes), Some(request.kind())),
                Err(DecodeError::UnknownType) => prop_assert_eq!(RequestKind::of(&bytes), None),
                Err(DecodeError::TooShort { need, have, .. }) => {
                    prop_assert!(have < need && have == bytes.len());
                }
            }
        }
    }
}
