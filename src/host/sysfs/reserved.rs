//! Reads the reserved regions of a host group, and merges them with those of the configuration. The file is long because
//! each rule has its test beside it.

use std::cmp::Reverse;
use std::fmt;

use super::read::printable;
use crate::address::{Iova, IovaRange};
use crate::topology::{MAX_RESERVED_REGIONS, ReservedKind, ReservedRegion, ReservedRegions};

/// The kind of a region in `reserved_regions` of a group in sysfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostRegionKind {
    /// Firmware requires a one-to-one mapping as long as the machine runs.
    Direct,
    /// Firmware requires a one-to-one mapping until a driver takes the device over. It is not reserved:
    /// VFIO type1 and iommufd leave such a region to user space, too.
    DirectRelaxable,
    /// The region must not be mapped.
    Reserved,
    /// Writes there are message-signalled interrupts.
    Msi,
    /// An unknown kind, treated as reserved.
    Other,
}

impl HostRegionKind {
    /// The kind that PROBE reports; `None` if the guest may map the region.
    pub fn reserved_kind(self) -> Option<ReservedKind> {
        match self {
            Self::Direct | Self::Reserved | Self::Other => Some(ReservedKind::Reserved),
            Self::Msi => Some(ReservedKind::Msi),
            Self::DirectRelaxable => None,
        }
    }
}

impl fmt::Display for HostRegionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::DirectRelaxable => "direct-relaxable",
            Self::Reserved => "reserved",
            Self::Msi => "msi",
            Self::Other => "of an unknown kind",
        })
    }
}

/// One line of a group's `reserved_regions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostRegion {
    /// The addresses.
    pub range: IovaRange,
    /// The kind.
    pub kind: HostRegionKind,
}

impl fmt::Display for HostRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.range, self.kind)
    }
}

/// Parses a group's `reserved_regions`: on each line the first and last address in hexadecimal, and a
/// kind. Returns the regions in their order, and the lines that cannot be parsed.
pub fn parse_regions(text: &str) -> (Vec<HostRegion>, Vec<String>) {
    let mut regions = Vec::new();
    let mut odd = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        match parse_line(line) {
            Some(region) => regions.push(region),
            None => odd.push(printable(line)),
        }
    }
    (regions, odd)
}

/// The addresses that an endpoint must not map: the configuration's regions, those of `host` that must
/// not be mapped, and the part of `input` outside the `allowed` ranges (`None`: unknown).
///
/// - The result covers exactly these addresses if [`MAX_RESERVED_REGIONS`] regions suffice for them.
///   Otherwise it also covers the smallest holes between the regions.
/// - At most one region is for MSIs: that of the configuration, else the largest one of the host (the lowest if several
///   are equally large). This MSI region keeps its kind and all its bytes: no gap between the `allowed` ranges and no
///   other region turns a part of it into a reserved region.
/// - Other MSI regions become reserved, without the bytes that they share with that one.
///
/// The configuration's region has precedence because PROBE names the doorbell to which the *guest* writes: a Linux guest
/// maps its doorbell, which leads to no memory, unless the region has it. On x86 both regions are the same. A host with
/// an SMMU reports a window (`SW_MSI` in Linux, `msi` in sysfs) in which the host's kernel maps the host's doorbell for
/// the device; that window is not at the guest's doorbell, and the guest must not map it.
/// - Reserved regions that overlap or touch are joined.
pub fn merge(
    config: &ReservedRegions,
    host: &[HostRegion],
    allowed: Option<&[IovaRange]>,
    input: IovaRange,
) -> ReservedRegions {
    let kept = host
        .iter()
        .filter_map(|region| Some((region.range, region.kind.reserved_kind()?)));
    let kept: Vec<_> = kept.collect();
    let msi = msi_window(config, &kept);

    let mut covered: Vec<IovaRange> = config.iter().map(|region| region.range).collect();
    covered.extend(kept.iter().map(|(range, _)| *range));
    covered.extend(
        allowed
            .map(|allowed| gaps(allowed, input))
            .unwrap_or_default(),
    );
    let mut reserved = joined(covered);
    if let Some(msi) = msi {
        reserved = reserved
            .into_iter()
            .flat_map(|range| without(range, msi))
            .collect();
    }
    let room = MAX_RESERVED_REGIONS.saturating_sub(usize::from(msi.is_some()));
    close_holes(&mut reserved, msi, room);

    let region = |kind| move |range| ReservedRegion { range, kind };
    let mut all: Vec<_> = reserved
        .into_iter()
        .map(region(ReservedKind::Reserved))
        .chain(msi.map(region(ReservedKind::Msi)))
        .collect();
    all.sort_by_key(|region| region.range);
    ReservedRegions::from_disjoint(all)
}

/// The parts of `input` outside all `allowed` ranges, which may come in any order.
pub fn gaps(allowed: &[IovaRange], input: IovaRange) -> Vec<IovaRange> {
    let mut left = vec![input];
    for &range in &joined(allowed.to_vec()) {
        // The ranges ascend, so that only the last piece can still overlap.
        let Some(last) = left.pop() else { break };
        left.extend(without(last, range));
    }
    left
}

fn parse_line(line: &str) -> Option<HostRegion> {
    let mut words = line.split_whitespace();
    let address = |word: &str| {
        let digits = word.strip_prefix("0x")?;
        let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        plain.then(|| u64::from_str_radix(digits, 16).ok())?
    };
    let first = address(words.next()?)?;
    let last = address(words.next()?)?;
    let kind = match (words.next()?, words.next()) {
        ("direct", None) => HostRegionKind::Direct,
        ("direct-relaxable", None) => HostRegionKind::DirectRelaxable,
        ("reserved", None) => HostRegionKind::Reserved,
        ("msi", None) => HostRegionKind::Msi,
        _ => HostRegionKind::Other,
    };
    let range = IovaRange::new(Iova(first), Iova(last))?;
    Some(HostRegion { range, kind })
}

fn msi_window(config: &ReservedRegions, host: &[(IovaRange, ReservedKind)]) -> Option<IovaRange> {
    let mut of_config = config.iter();
    let of_config = of_config.find(|region| region.kind == ReservedKind::Msi);
    let of_host = || {
        host.iter()
            .filter(|(_, kind)| *kind == ReservedKind::Msi)
            .map(|(range, _)| *range)
            .max_by_key(|range| (range.span(), Reverse(range.first())))
    };
    of_config.map(|region| region.range).or_else(of_host)
}

/// The ranges in ascending order, with overlapping and adjacent ones joined.
fn joined(mut ranges: Vec<IovaRange>) -> Vec<IovaRange> {
    ranges.sort_unstable();
    let mut result: Vec<IovaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        if let Some(last) = result.last_mut()
            && last
                .last()
                .0
                .checked_add(1)
                .is_none_or(|next| range.first().0 <= next)
        {
            *last = spanning(*last, range);
        } else {
            result.push(range);
        }
    }
    result
}

/// The smallest range that covers both.
fn spanning(low: IovaRange, high: IovaRange) -> IovaRange {
    let last = low.last().max(high.last());
    IovaRange::new(low.first(), last).unwrap_or(IovaRange::ALL)
}

/// The parts of `range` outside `hole`: none, one or two pieces, ascending.
fn without(range: IovaRange, hole: IovaRange) -> impl Iterator<Item = IovaRange> {
    let (below, above) = if range.overlaps(hole) {
        let before = hole.first().0.checked_sub(1).map(Iova);
        let after = hole.last().0.checked_add(1).map(Iova);
        (
            before.and_then(|last| IovaRange::new(range.first(), last)),
            after.and_then(|first| IovaRange::new(first, range.last())),
        )
    } else {
        (Some(range), None)
    };
    below.into_iter().chain(above)
}

/// Joins neighbours across the smallest holes until there are at most `room` (at least 2) ranges.
/// A hole with `msi` in it stays.
fn close_holes(ranges: &mut Vec<IovaRange>, msi: Option<IovaRange>, room: usize) {
    let surplus = ranges.len().saturating_sub(room);
    if surplus == 0 {
        return;
    }
    let mut holes: Vec<(u64, usize)> = ranges
        .windows(2)
        .enumerate()
        .filter_map(|(index, pair)| {
            let [low, high] = *pair else { return None };
            let around = |msi: IovaRange| low.last() < msi.first() && msi.last() < high.first();
            let size = high.first().0.checked_sub(low.last().0)?;
            (!msi.is_some_and(around)).then_some((size, index))
        })
        .collect();
    holes.sort_unstable();
    let mut closed: Vec<usize> = holes
        .iter()
        .take(surplus)
        .map(|(_, index)| *index)
        .collect();
    closed.sort_unstable();
    // From the top, so that the indices of the others stay valid.
    for index in closed.into_iter().rev() {
        let high = ranges.remove(index + 1);
        if let Some(low) = ranges.get_mut(index) {
            *low = spanning(*low, high);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(first), Iova(last)).expect("first <= last")
    }

    fn host(first: u64, last: u64, kind: HostRegionKind) -> HostRegion {
        HostRegion {
            range: range(first, last),
            kind,
        }
    }

    fn config(regions: &[(u64, u64, ReservedKind)]) -> ReservedRegions {
        let region = |&(first, last, kind): &(u64, u64, ReservedKind)| ReservedRegion {
            range: range(first, last),
            kind,
        };
        ReservedRegions::new(regions.iter().map(region).collect()).expect("disjoint")
    }

    fn shown(regions: &ReservedRegions) -> Vec<String> {
        regions.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn lines_of_sysfs_are_read() {
        let text = "0x00000000fee00000 0x00000000feefffff msi\n\
                    0x0000000000000000 0x0000000000ffffff direct-relaxable\n\
                    0x000000008d000000 0x000000008d0fffff direct\n\
                    0x000000fd00000000 0x000000ffffffffff reserved\n\
                    0x1000 0x1fff translated\n\n";
        let (regions, odd) = parse_regions(text);
        assert_eq!(odd, Vec::<String>::new());
        assert_eq!(
            regions,
            [
                host(0xfee0_0000, 0xfeef_ffff, HostRegionKind::Msi),
                host(0, 0xff_ffff, HostRegionKind::DirectRelaxable),
                host(0x8d00_0000, 0x8d0f_ffff, HostRegionKind::Direct),
                host(0xfd_0000_0000, 0xff_ffff_ffff, HostRegionKind::Reserved),
                host(0x1000, 0x1fff, HostRegionKind::Other),
            ]
        );
    }

    #[test]
    fn lines_that_cannot_be_read_are_kept_apart() {
        for odd in [
            "0x2000 0x1fff msi",
            "1000 1fff msi",
            "0x1000",
            "0x1000 0x1fff",
            "0x+1 0x2 msi",
            "0x10000000000000000 0x10000000000000001 msi",
            "\u{1b}[2J",
        ] {
            let (regions, lines) = parse_regions(odd);
            assert_eq!((regions.len(), lines.len()), (0, 1), "{odd:?}");
            assert!(!lines[0].contains('\u{1b}'));
        }
    }

    #[test]
    fn an_intel_host_with_39_bits_reserves_all_addresses_above() {
        let merged = merge(
            &config(&[(0xfee0_0000, 0xfeef_ffff, ReservedKind::Msi)]),
            &[
                host(0xfee0_0000, 0xfeef_ffff, HostRegionKind::Msi),
                host(0, 0xff_ffff, HostRegionKind::DirectRelaxable),
            ],
            Some(&[range(0, 0xfedf_ffff), range(0xfef0_0000, 0x7f_ffff_ffff)]),
            range(0, 0xffff_ffff_ffff),
        );
        assert_eq!(
            shown(&merged),
            [
                "0xfee00000..=0xfeefffff:msi",
                "0x8000000000..=0xffffffffffff:reserved"
            ]
        );
    }

    #[test]
    fn without_a_configured_msi_region_the_hosts_largest_is_reported() {
        let merged = merge(
            &config(&[]),
            &[
                host(0x800_0000, 0x80f_ffff, HostRegionKind::Msi),
                host(0x900_0000, 0x90f_ffff, HostRegionKind::Msi),
                host(0x100_0000, 0x100_ffff, HostRegionKind::Msi),
                host(0x7ff_0000, 0x800_ffff, HostRegionKind::Reserved),
            ],
            None,
            IovaRange::ALL,
        );
        assert_eq!(
            shown(&merged),
            [
                "0x1000000..=0x100ffff:reserved",
                "0x7ff0000..=0x7ffffff:reserved",
                "0x8000000..=0x80fffff:msi",
                "0x9000000..=0x90fffff:reserved",
            ]
        );
    }

    /// An SMMU's window for the host's doorbell, as Linux 7.3.4 reports it in sysfs and as a gap of the allowed ranges.
    #[test]
    fn an_smmus_msi_window_is_reserved_around_the_guests_doorbell() {
        let window = host(0x800_0000, 0x80f_ffff, HostRegionKind::Msi);
        let allowed = [range(0, 0x7ff_ffff), range(0x810_0000, 0xffff_ffff_ffff)];
        let regions = |msi: (u64, u64)| {
            let config = config(&[(msi.0, msi.1, ReservedKind::Msi)]);
            let input = range(0, 0xffff_ffff_ffff);
            shown(&merge(&config, &[window], Some(&allowed), input))
        };
        // QEMU's `virt` has its ITS within the window, q35 has its APICs elsewhere.
        assert_eq!(
            regions((0x809_0000, 0x809_ffff)),
            [
                "0x8000000..=0x808ffff:reserved",
                "0x8090000..=0x809ffff:msi",
                "0x80a0000..=0x80fffff:reserved",
            ]
        );
        assert_eq!(
            regions((0xfee0_0000, 0xfeef_ffff)),
            [
                "0x8000000..=0x80fffff:reserved",
                "0xfee00000..=0xfeefffff:msi"
            ]
        );
    }

    /// An Arm guest on an x86 host: its doorbell is not at the host's.
    #[test]
    fn an_x86_hosts_msi_region_is_reserved_for_an_arm_guest() {
        let merged = merge(
            &config(&[(0x809_0000, 0x809_ffff, ReservedKind::Msi)]),
            &[host(0xfee0_0000, 0xfeef_ffff, HostRegionKind::Msi)],
            None,
            IovaRange::ALL,
        );
        assert_eq!(
            shown(&merged),
            [
                "0x8090000..=0x809ffff:msi",
                "0xfee00000..=0xfeefffff:reserved"
            ]
        );
    }

    #[test]
    fn without_allowed_ranges_everything_is_reserved() {
        let merged = merge(&config(&[]), &[], Some(&[]), IovaRange::ALL);
        assert_eq!(shown(&merged), ["0x0..=0xffffffffffffffff:reserved"]);
        assert_eq!(gaps(&[IovaRange::ALL], range(5, 9)), []);
        assert_eq!(
            gaps(&[range(7, 7)], range(5, 9)),
            [range(5, 6), range(8, 9)]
        );
    }

    #[test]
    fn too_many_regions_lose_the_smallest_holes() {
        // Every hole is a page, except for one of a byte and the hole with the MSI window.
        let mut regions: Vec<_> = (0..70)
            .map(|n| host(n << 13, (n << 13) + 0xfff, HostRegionKind::Reserved))
            .collect();
        regions.push(host(0x3000, 0x3ffe, HostRegionKind::Reserved));
        regions.push(host(0x5400, 0x54ff, HostRegionKind::Msi));
        let merged = merge(&config(&[]), &regions, None, IovaRange::ALL);
        assert_eq!(merged.len(), MAX_RESERVED_REGIONS);
        let at = |first, last| merged.overlapping(range(first, last)).copied();
        assert_eq!(at(0x5400, 0x54ff).map(|r| r.kind), Some(ReservedKind::Msi));
        assert_eq!(at(0x5100, 0x53ff), None, "the MSI window's hole stays");
        assert!(at(0x3fff, 0x3fff).is_some(), "the hole of a byte is closed");
    }

    fn kind() -> impl Strategy<Value = HostRegionKind> {
        prop_oneof![
            Just(HostRegionKind::Direct),
            Just(HostRegionKind::DirectRelaxable),
            Just(HostRegionKind::Reserved),
            Just(HostRegionKind::Msi),
            Just(HostRegionKind::Other),
        ]
    }

    proptest! {
        #[test]
        fn merged_regions_cover_exactly_the_reserved_addresses(
            own in proptest::collection::vec((0u64..30, 0u64..4), 0..6),
            own_msi in proptest::option::of(0usize..6),
            given in proptest::collection::vec((0u64..300, 0u64..8, kind()), 0..160),
            allowed in proptest::option::of(
                proptest::collection::vec((0u64..300, 0u64..200), 0..5)
            ),
            input_last in 1u64..320,
            // Addresses at the top, too: the last address has no successor.
            top: bool,
        ) {
            let base = if top { u64::MAX - 320 } else { 0 };
            let at = |first: u64, span: u64| range(base + first, base + (first + span).min(320));
            let mut regions: Vec<ReservedRegion> = Vec::new();
            for (first, span) in own {
                let range = at(first * 10, span);
                if regions.iter().all(|r| !r.range.overlaps(range)) {
                    regions.push(ReservedRegion { range, kind: ReservedKind::Reserved });
                }
            }
            if let Some(region) = own_msi.and_then(|n| regions.get_mut(n)) {
                region.kind = ReservedKind::Msi;
            }
            let config = ReservedRegions::new(regions).expect("disjoint");
            let host: Vec<_> = given
                .into_iter()
                .map(|(first, span, kind)| HostRegion { range: at(first, span), kind })
                .collect();
            let allowed: Option<Vec<_>> =
                allowed.map(|list| list.into_iter().map(|(a, b)| at(a, b)).collect());
            let input = at(0, input_last);
            let merged = merge(&config, &host, allowed.as_deref(), input);

            let list: Vec<_> = merged.iter().copied().collect();
            prop_assert!(ReservedRegions::new(list.clone()).is_ok());
            prop_assert!(list.windows(2).all(|p| p[0].range.last() < p[1].range.first()));
            let msi: Vec<_> = list.iter().filter(|r| r.kind == ReservedKind::Msi).collect();
            let any_msi = host.iter().any(|r| r.kind == HostRegionKind::Msi)
                || config.iter().any(|r| r.kind == ReservedKind::Msi);
            prop_assert_eq!(msi.len(), usize::from(any_msi));

            let wanted = |address: Iova| {
                config.iter().any(|r| r.range.contains(address))
                    || host.iter().any(|r| {
                        r.kind != HostRegionKind::DirectRelaxable && r.range.contains(address)
                    })
                    || (input.contains(address)
                        && allowed.as_ref().is_some_and(|a| !a.iter().any(|r| r.contains(address))))
            };
            let mut pieces = 0usize;
            let mut before = false;
            for offset in 0..=320 {
                let address = Iova(base + offset);
                let covered = list.iter().any(|r| r.range.contains(address));
                let want = wanted(address);
                prop_assert!(covered || !want, "{} is uncovered", address);
                pieces += usize::from(want && !before);
                before = want;
                // Each piece may be cut in three by the MSI window.
                if list.len() < MAX_RESERVED_REGIONS {
                    prop_assert_eq!(covered, want, "{}", address);
                }
            }
            prop_assert!(pieces + 2 > MAX_RESERVED_REGIONS || list.len() <= pieces + 2);
        }

        #[test]
        fn no_text_panics(text in "(((0x[0-9a-f]{0,17} ){2}(msi|direct|x)?|\\PC{0,9})\n){0,6}") {
            let (regions, odd) = parse_regions(&text);
            prop_assert!(regions.len() + odd.len() <= text.lines().count());
        }
    }
}
