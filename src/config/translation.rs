//! Keys that shape translation: address width, page sizes, bypass at boot.

use super::bounds::{MAX_WIDTH, MIN_WIDTH};
use super::checker::Checker;
use super::draft::{Located, Scalar};
use super::error::ProblemKind;
use super::text::{parse_size, shown};
use crate::address::PageMask;

const DEFAULT_WIDTH: u8 = 48;
const GRANULES: [u64; 4] = [4 << 10, 16 << 10, 64 << 10, 2 << 20];

impl Checker<'_> {
    pub(super) fn address_width(&mut self, given: Option<&Located<Scalar>>) -> Option<u8> {
        let Some(given) = given else {
            return Some(DEFAULT_WIDTH);
        };
        let bits = self.integer(given, "address-width", "a number of bits, such as 48")?;
        let width = u8::try_from(bits)
            .ok()
            .filter(|width| (MIN_WIDTH..=MAX_WIDTH).contains(width));
        if width.is_none() {
            self.refuse(&given.origin, "address-width", ProblemKind::Width(bits));
        }
        width
    }

    pub(super) fn granule(&mut self, given: Option<&Located<Scalar>>) -> Option<u64> {
        let Some(given) = given else {
            return Some(GRANULES[0]);
        };
        let size = match &given.value {
            Scalar::Text(text) => parse_size(text),
            Scalar::Integer(bytes) => u64::try_from(*bytes).ok(),
            other => {
                let wanted = "a size as a text, such as \"4k\"";
                self.wrong_type(given, "granule", other.found(), wanted);
                return None;
            }
        };
        let granule = size.filter(|size| GRANULES.contains(size));
        if granule.is_none() {
            let kind = ProblemKind::Granule(shown(&given.value));
            self.refuse(&given.origin, "granule", kind);
        }
        granule
    }

    pub(super) fn bypass(&mut self, given: Option<&Located<Scalar>>) -> Option<bool> {
        match given {
            None => Some(true),
            Some(Located {
                value: Scalar::Bool(value),
                ..
            }) => Some(*value),
            Some(given) => {
                self.wrong_type(given, "bypass", given.value.found(), "true or false");
                None
            }
        }
    }
}

pub(super) fn page_mask(granule: u64) -> Option<PageMask> {
    let larger = PageMask::TABLE.bits() & !(granule - 1);
    PageMask::new(granule | larger)
}
