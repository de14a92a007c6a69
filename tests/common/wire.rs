//! The bytes of requests, statuses and the configuration space (virtio specification, "IOMMU device").

/// VIRTIO_IOMMU_F_INPUT_RANGE.
pub const F_INPUT_RANGE: u64 = 1 << 0;
/// VIRTIO_IOMMU_F_DOMAIN_RANGE.
pub const F_DOMAIN_RANGE: u64 = 1 << 1;
/// VIRTIO_IOMMU_F_MAP_UNMAP.
pub const F_MAP_UNMAP: u64 = 1 << 2;
/// VIRTIO_IOMMU_F_BYPASS.
pub const F_BYPASS: u64 = 1 << 3;
/// VIRTIO_IOMMU_F_PROBE.
pub const F_PROBE: u64 = 1 << 4;
/// VIRTIO_IOMMU_F_MMIO.
pub const F_MMIO: u64 = 1 << 5;
/// VIRTIO_IOMMU_F_BYPASS_CONFIG.
pub const F_BYPASS_CONFIG: u64 = 1 << 6;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

/// Request types.
pub const T_ATTACH: u8 = 1;
/// See [`T_ATTACH`].
pub const T_DETACH: u8 = 2;
/// See [`T_ATTACH`].
pub const T_MAP: u8 = 3;
/// See [`T_ATTACH`].
pub const T_UNMAP: u8 = 4;
/// See [`T_ATTACH`].
pub const T_PROBE: u8 = 5;

/// Statuses.
pub const OK: u8 = 0;
/// Virtio communication error.
pub const IOERR: u8 = 1;
/// Unsupported request.
pub const UNSUPP: u8 = 2;
/// Internal device error.
pub const DEVERR: u8 = 3;
/// Invalid parameters.
pub const INVAL: u8 = 4;
/// Out-of-range parameters.
pub const RANGE: u8 = 5;
/// Entry not found.
pub const NOENT: u8 = 6;
/// Bad address.
pub const FAULT: u8 = 7;
/// Insufficient resources.
pub const NOMEM: u8 = 8;

/// MAP flag: endpoints may read.
pub const READ: u32 = 1;
/// MAP flag: endpoints may write.
pub const WRITE: u32 = 2;
/// MAP flag: device registers, not memory.
pub const MMIO: u32 = 4;
/// MAP flags: endpoints may read and write.
pub const RW: u32 = READ | WRITE;
/// ATTACH flag: the domain is a bypass domain.
pub const BYPASS: u32 = 1;

/// Bytes of the status tail.
pub const TAIL: usize = 4;
/// Bytes of `struct virtio_iommu_config`.
pub const CONFIG_LEN: u32 = 40;
/// Offset of `bypass` in the configuration space.
pub const CONFIG_BYPASS: u32 = 36;

/// A little-endian encoder.
struct Bytes(Vec<u8>);

impl Bytes {
    fn head(kind: u8) -> Self {
        Self(vec![kind, 0, 0, 0])
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }
}

/// The readable part of ATTACH, 20 bytes.
pub fn attach(domain: u32, endpoint: u32, flags: u32) -> Vec<u8> {
    let head = Bytes::head(T_ATTACH).u32(domain).u32(endpoint);
    head.u32(flags).zeros(4).0
}

/// The readable part of DETACH, 20 bytes.
pub fn detach(domain: u32, endpoint: u32) -> Vec<u8> {
    let head = Bytes::head(T_DETACH).u32(domain).u32(endpoint);
    head.zeros(8).0
}

/// The readable part of MAP, 36 bytes.
pub fn map(domain: u32, first: u64, last: u64, gpa: u64, flags: u32) -> Vec<u8> {
    let head = Bytes::head(T_MAP).u32(domain).u64(first).u64(last);
    head.u64(gpa).u32(flags).0
}

/// The readable part of UNMAP, 28 bytes.
pub fn unmap(domain: u32, first: u64, last: u64) -> Vec<u8> {
    let head = Bytes::head(T_UNMAP).u32(domain).u64(first).u64(last);
    head.zeros(4).0
}

/// The readable part of PROBE, 72 bytes.
pub fn probe(endpoint: u32) -> Vec<u8> {
    Bytes::head(T_PROBE).u32(endpoint).zeros(64).0
}

/// The configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `page_size_mask`.
    pub page_size_mask: u64,
    /// `input_range`, closed.
    pub input: (u64, u64),
    /// `domain_range`, closed.
    pub domains: (u32, u32),
    /// `probe_size`.
    pub probe_size: u32,
    /// `bypass`.
    pub bypass: u8,
    /// `reserved`.
    pub reserved: [u8; 3],
}

impl Config {
    /// Decodes the 40 bytes.
    pub fn parse(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), CONFIG_LEN as usize);
        Self {
            page_size_mask: u64_at(bytes, 0),
            input: (u64_at(bytes, 8), u64_at(bytes, 16)),
            domains: (u32_at(bytes, 24), u32_at(bytes, 28)),
            probe_size: u32_at(bytes, 32),
            bypass: bytes[36],
            reserved: [bytes[37], bytes[38], bytes[39]],
        }
    }
}

/// A RESV_MEM property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resv {
    /// 0 reserved, 1 MSI.
    pub subtype: u8,
    /// First address.
    pub start: u64,
    /// Last address.
    pub end: u64,
}

/// Decodes the properties of a PROBE as the driver does. Fails the test if a reserved byte is not zero.
pub fn parse_properties(bytes: &[u8]) -> Vec<Resv> {
    let mut found = Vec::new();
    let mut at = 0;
    while at + 4 <= bytes.len() {
        let kind = u16_at(bytes, at);
        let len = usize::from(u16_at(bytes, at + 2));
        if kind == 0 {
            break;
        }
        assert_eq!(
            kind, 1,
            "the type is RESV_MEM, the only one defined, with zero top bits"
        );
        assert_eq!(len, 20, "the length counts the value without its head");
        let value = &bytes[at + 4..at + 4 + len];
        assert_eq!(value[1..4], [0; 3], "reserved bytes of RESV_MEM");
        found.push(Resv {
            subtype: value[0],
            start: u64_at(value, 4),
            end: u64_at(value, 12),
        });
        at += 4 + len;
    }
    assert!(
        bytes[at..].iter().all(|&byte| byte == 0),
        "the rest of the properties is zero"
    );
    found
}

/// A fault record, 24 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// 0 unknown, 1 domain, 2 mapping.
    pub reason: u8,
    /// READ 1, WRITE 2, ADDRESS 0x100, combined.
    pub flags: u32,
    /// The endpoint.
    pub endpoint: u32,
    /// The address of the access. Valid if `flags` has ADDRESS.
    pub address: u64,
}

impl Fault {
    /// Decodes a record. Fails the test if a reserved byte is not zero.
    pub fn parse(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 24);
        assert_eq!(bytes[1..4], [0; 3]);
        assert_eq!(u32_at(bytes, 12), 0);
        Self {
            reason: bytes[0],
            flags: u32_at(bytes, 4),
            endpoint: u32_at(bytes, 8),
            address: u64_at(bytes, 16),
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
