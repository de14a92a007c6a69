//! PCI addresses and closed ranges of them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::ids::EndpointId;

const MAX_DEVICE: u8 = 31;
const MAX_FUNCTION: u8 = 7;

/// The address of a PCI function: segment, bus, device and function.
///
/// Ordered as the [`EndpointId`]s made from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    segment: u16,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// The address, or `None` if `device` is above 31 or `function` above 7.
    pub fn new(segment: u16, bus: u8, device: u8, function: u8) -> Option<Self> {
        (device <= MAX_DEVICE && function <= MAX_FUNCTION).then_some(Self {
            segment,
            bus,
            device,
            function,
        })
    }

    /// The address for an endpoint ID: the inverse of [`endpoint_id`](Self::endpoint_id).
    pub fn from_endpoint_id(id: EndpointId) -> Self {
        let [segment_high, segment_low, bus, devfn] = id.0.to_be_bytes();
        Self {
            segment: u16::from_be_bytes([segment_high, segment_low]),
            bus,
            device: devfn >> 3,
            function: devfn & MAX_FUNCTION,
        }
    }

    /// The PCI segment, which Linux calls domain.
    pub fn segment(self) -> u16 {
        self.segment
    }

    /// The bus.
    pub fn bus(self) -> u8 {
        self.bus
    }

    /// The device, `0..=31`.
    pub fn device(self) -> u8 {
        self.device
    }

    /// The function, `0..=7`.
    pub fn function(self) -> u8 {
        self.function
    }

    /// Bus, device and function as one number: `bus << 8 | device << 3 | function`.
    pub fn bdf(self) -> u16 {
        u16::from(self.bus) << 8 | u16::from(self.device) << 3 | u16::from(self.function)
    }

    /// The endpoint ID of the function: `segment << 16 | bdf`.
    pub fn endpoint_id(self) -> EndpointId {
        EndpointId(u32::from(self.segment) << 16 | u32::from(self.bdf()))
    }
}

impl fmt::Display for PciAddress {
    /// As the [`EndpointId`] of the function is printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.endpoint_id().fmt(f)
    }
}

/// The text is not a PCI address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "not a PCI address; write [segment:]bus:device.function in hexadecimal, \
     such as 00:05.0 or 0000:00:05.0, with a device up to 1f and a function up to 7"
)]
pub struct PciAddressError;

impl FromStr for PciAddress {
    type Err = PciAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_address(text).ok_or(PciAddressError)
    }
}

/// The address of a PCI function on the host, as `lspci -D` prints it.
///
/// Linux gives segments of its own (domains) to devices behind some controllers, from 0x10000 on. Such a domain has
/// up to 32 bits, so the address does not fit a [`PciAddress`], whose segment is that of ACPI's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl HostAddress {
    /// The PCI domain.
    pub fn domain(self) -> u32 {
        self.domain
    }

    /// The bus.
    pub fn bus(self) -> u8 {
        self.bus
    }

    /// The device, `0..=31`.
    pub fn device(self) -> u8 {
        self.device
    }

    /// The function, `0..=7`.
    pub fn function(self) -> u8 {
        self.function
    }
}

impl From<PciAddress> for HostAddress {
    fn from(address: PciAddress) -> Self {
        Self {
            domain: address.segment.into(),
            bus: address.bus,
            device: address.device,
            function: address.function,
        }
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

/// The text is not the address of a PCI function on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "not a PCI address of the host; write [domain:]bus:device.function in hexadecimal as `lspci -D` prints it, \
     such as 0000:65:00.0"
)]
pub struct HostAddressError;

impl FromStr for HostAddress {
    type Err = HostAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            if let Some(address) = parse_address(text) {
                return Some(address.into());
            }
            let (domain, rest) = text.split_once(':')?;
            let address = parse_address(rest).filter(|_| rest.matches(':').count() == 1)?;
            let fits = (1..=8).contains(&domain.len());
            let is_number = fits && domain.bytes().all(|byte| byte.is_ascii_hexdigit());
            let domain = is_number.then(|| u32::from_str_radix(domain, 16).ok())??;
            Some(Self {
                domain,
                ..address.into()
            })
        };
        parse().ok_or(HostAddressError)
    }
}

/// A closed range of PCI functions within one segment: `first..=last`. Never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciRange {
    first: PciAddress,
    last: PciAddress,
}

impl PciRange {
    /// The range `first..=last`.
    ///
    /// # Errors
    ///
    /// The two lie in different segments, or `last` comes before `first`.
    pub fn new(first: PciAddress, last: PciAddress) -> Result<Self, PciRangeError> {
        if first.segment != last.segment {
            return Err(PciRangeError::AcrossSegments { first, last });
        }
        if last < first {
            return Err(PciRangeError::Backwards { first, last });
        }
        Ok(Self { first, last })
    }

    /// The first function.
    pub fn first(self) -> PciAddress {
        self.first
    }

    /// The last function, which belongs to the range.
    pub fn last(self) -> PciAddress {
        self.last
    }

    /// The number of functions: `1..=65536`.
    pub fn count(self) -> u64 {
        u64::from(self.last.bdf() - self.first.bdf()) + 1
    }

    /// Whether `address` lies in the range.
    pub fn contains(self, address: PciAddress) -> bool {
        (self.first..=self.last).contains(&address)
    }

    /// Whether the two ranges share a function.
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// This range without `other`, which it must contain: up to two ranges.
    pub fn without(self, other: Self) -> impl Iterator<Item = Self> {
        let neighbour = |bdf: Option<u16>| {
            let segment = u32::from(self.first.segment()) << 16;
            bdf.map(|bdf| PciAddress::from_endpoint_id(EndpointId(segment | u32::from(bdf))))
        };
        let before = neighbour(other.first.bdf().checked_sub(1));
        let after = neighbour(other.last.bdf().checked_add(1));
        let before = before.and_then(|last| Self::new(self.first, last).ok());
        let after = after.and_then(|first| Self::new(first, self.last).ok());
        before.into_iter().chain(after)
    }
}

impl From<PciAddress> for PciRange {
    fn from(address: PciAddress) -> Self {
        Self {
            first: address,
            last: address,
        }
    }
}

impl fmt::Display for PciRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// The text or the pair of addresses is not a range of PCI functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PciRangeError {
    /// One of the ends is not an address.
    #[error(transparent)]
    Address(#[from] PciAddressError),
    /// The ends lie in different segments.
    #[error("{first} and {last} are in different segments; write one range for each segment")]
    AcrossSegments {
        /// The first function.
        first: PciAddress,
        /// The last function.
        last: PciAddress,
    },
    /// The last function comes before the first.
    #[error("the range ends at {last}, before its start {first}; put the lower address first")]
    Backwards {
        /// The first function.
        first: PciAddress,
        /// The last function.
        last: PciAddress,
    },
}

impl FromStr for PciRange {
    type Err = PciRangeError;

    /// Parses `address` or `address-address`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('-') {
            None => Ok(text.parse::<PciAddress>()?.into()),
            Some((first, last)) => Self::new(first.trim_end().parse()?, last.trim_start().parse()?),
        }
    }
}

fn parse_address(text: &str) -> Option<PciAddress> {
    let (rest, function) = text.rsplit_once('.')?;
    let mut parts = rest.rsplit(':');
    let device = hex(parts.next()?, 2)?;
    let bus = hex(parts.next()?, 2)?;
    let segment = parts.next().map_or(Some(0), |part| hex(part, 4))?;
    if parts.next().is_some() {
        return None;
    }
    PciAddress::new(
        segment,
        u8::try_from(bus).ok()?,
        u8::try_from(device).ok()?,
        u8::try_from(hex(function, 1)?).ok()?,
    )
}

/// Parses `1..=digits` hexadecimal digits, without sign or prefix.
fn hex(text: &str, digits: usize) -> Option<u16> {
    let fits = (1..=digits).contains(&text.len());
    (fits && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .then(|| u16::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> PciAddress {
        text.parse().expect("an address")
    }

    #[test]
    fn addresses_are_parsed_and_printed() {
        let full = address("00a1:fe:1f.7");
        assert_eq!((full.segment(), full.bus()), (0xa1, 0xfe));
        assert_eq!((full.device(), full.function()), (0x1f, 7));
        assert_eq!(full.bdf(), 0xfeff);
        assert_eq!(full.endpoint_id(), EndpointId(0x00a1_feff));
        assert_eq!(full.to_string(), "00a1:fe:1f.7");
        assert_eq!(address("0:5.0"), address("0000:00:05.0"));
        assert_eq!(address("FFFF:FF:1F.7").endpoint_id(), EndpointId(u32::MAX));
    }

    #[test]
    fn invalid_addresses_are_refused() {
        for text in [
            "",
            "5",
            "00:05",
            "05.0",
            "00:20.0",
            "00:05.8",
            "100:05.0:0",
            "00:00:00:05.0",
            "10000:00:05.0",
            "100:05.0",
            "0:100:05.0",
            "00:05.",
            ":05.0",
            "+0:05.0",
            "00:+5.0",
            "0x0:05.0",
            "00:05.0 ",
            "00:05.00",
            "00:0g.0",
            "\u{663}:05.0",
        ] {
            assert_eq!(text.parse::<PciAddress>(), Err(PciAddressError), "{text:?}");
        }
        assert!(PciAddressError.to_string().contains("such as 00:05.0"));
    }

    #[test]
    fn ranges_stay_in_one_segment_and_run_forwards() {
        let range: PciRange = "00:10.0-00:1f.7".parse().expect("a range");
        assert_eq!(range.count(), 128);
        assert!(range.contains(address("00:1f.7")) && !range.contains(address("00:0f.7")));
        assert_eq!(range.to_string(), "0000:00:10.0-0000:00:1f.7");
        assert_eq!(
            "0001:00:00.0 - 0001:ff:1f.7"
                .parse::<PciRange>()
                .expect("a whole segment")
                .count(),
            65536
        );
        let one: PciRange = "00:10.0".parse().expect("one function");
        assert_eq!((one.count(), one.to_string()), (1, "0000:00:10.0".into()));
        assert!(matches!(
            "00:10.0-0001:00:11.0".parse::<PciRange>(),
            Err(PciRangeError::AcrossSegments { .. })
        ));
        assert!(matches!(
            "00:10.0-00:0f.7".parse::<PciRange>(),
            Err(PciRangeError::Backwards { .. })
        ));
        assert!(matches!(
            "00:10.0-".parse::<PciRange>(),
            Err(PciRangeError::Address(_))
        ));
    }

    #[test]
    fn domains_of_the_host_have_32_bits() {
        for (text, printed) in [
            ("65:00.1", "0000:65:00.1"),
            ("0001:65:00.1", "0001:65:00.1"),
            ("10000:e1:00.0", "10000:e1:00.0"),
            ("FFFFFFFF:ff:1f.7", "ffffffff:ff:1f.7"),
        ] {
            let address: HostAddress = text.parse().expect(text);
            assert_eq!(address.to_string(), printed);
            assert_eq!(printed.parse(), Ok(address));
        }
        for text in [
            "",
            "1:10000:e1:00.0",
            "100000000:e1:00.0",
            "+10000:e1:00.0",
            "10000:e1:20.0",
            ":e1:00.0",
        ] {
            assert_eq!(
                text.parse::<HostAddress>(),
                Err(HostAddressError),
                "{text:?}"
            );
        }
        assert_eq!(
            HostAddress::from(address("00a1:fe:1f.7")).to_string(),
            "00a1:fe:1f.7"
        );
    }

    proptest! {
        #[test]
        fn endpoint_ids_and_texts_survive_a_round_trip(id: u32) {
            let made = PciAddress::from_endpoint_id(EndpointId(id));
            prop_assert_eq!(made.endpoint_id(), EndpointId(id));
            prop_assert_eq!(made.to_string().parse::<PciAddress>(), Ok(made));
        }

        #[test]
        fn order_is_that_of_endpoint_ids(a: u32, b: u32) {
            let (left, right) = (EndpointId(a), EndpointId(b));
            prop_assert_eq!(
                PciAddress::from_endpoint_id(left).cmp(&PciAddress::from_endpoint_id(right)),
                left.cmp(&right)
            );
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,24}") {
            let _ = (text.parse::<PciRange>(), text.parse::<HostAddress>());
        }
    }
}
