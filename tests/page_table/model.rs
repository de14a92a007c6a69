//! A plain interval model of a table.

use std::collections::{BTreeMap, HashMap};

use vhost_device_iommu::address::{Gpa, Iova, IovaRange};
use vhost_device_iommu::page_table::{
    Encoding, Format, Levels, MapRefusal, Mapping, OutOfFrames, Translation, Unmapped, WouldSplit,
};

use crate::{GIB, MIB2, PAGE};

/// The leaves of a mapping, as level and first address, found step by step.
pub fn leaves(mapping: &Mapping) -> impl Iterator<Item = (u32, u64)> {
    let (first, last, gpa) = (
        mapping.range.first().0,
        mapping.range.last().0,
        mapping.gpa.0,
    );
    let mut at = Some(first);
    std::iter::from_fn(move || {
        let iova = at?;
        let (level, bytes) = [(3, GIB), (2, MIB2), (1, PAGE)]
            .into_iter()
            .find(|(_, bytes)| {
                iova % bytes == 0 && (gpa + (iova - first)) % bytes == 0 && last - iova >= bytes - 1
            })
            .expect("whole pages");
        at = (iova + (bytes - 1) < last).then(|| iova + bytes);
        Some((level, iova))
    })
}

/// The expected state of the table: mappings by first address, and the number of mappings that use
/// each table.
pub struct Model {
    pub encoding: Encoding,
    pub levels: Levels,
    pub mappings: BTreeMap<u64, Mapping>,
    pub bytes: u64,
    /// By level and by the address bits above those that the table covers; without the root.
    pub tables: HashMap<(u32, u64), u64>,
    pub retired: u64,
    pub frames_total: u64,
}

impl Model {
    pub fn new(encoding: Encoding, levels: Levels, frames_total: u64) -> Self {
        Self {
            encoding,
            levels,
            mappings: BTreeMap::new(),
            bytes: 0,
            tables: HashMap::new(),
            retired: 0,
            frames_total,
        }
    }

    pub fn at(&self, iova: u64) -> Option<&Mapping> {
        let (_, found) = self.mappings.range(..=iova).next_back()?;
        found.range.contains(Iova(iova)).then_some(found)
    }

    pub fn overlapping(&self, wanted: IovaRange) -> impl Iterator<Item = &Mapping> {
        let (first, last) = (wanted.first().0, wanted.last().0);
        let start = self.at(first).map_or(first, |found| found.range.first().0);
        self.mappings.range(start..=last).map(|(_, found)| found)
    }

    pub fn tables_of(&self, mapping: &Mapping) -> Vec<(u32, u64)> {
        let mut tables = Vec::new();
        let mut newest = [u64::MAX; 6];
        for (leaf_level, iova) in leaves(mapping) {
            for level in leaf_level..self.levels.count() {
                let covered = iova >> (12 + 9 * level);
                let newest = &mut newest[level as usize];
                if *newest == covered {
                    break;
                }
                *newest = covered;
                tables.push((level, covered));
            }
        }
        tables
    }

    pub fn free(&self) -> u64 {
        self.frames_total - 2 - self.tables.len() as u64 - self.retired
    }

    pub fn map(&mut self, wanted: &Mapping) -> Result<(), MapRefusal> {
        let (first, last) = (wanted.range.first().0, wanted.range.last().0);
        let pages = |address: u64| address.is_multiple_of(PAGE);
        if !(pages(first) && pages(last.wrapping_add(1)) && pages(wanted.gpa.0)) {
            return Err(MapRefusal::Misaligned);
        }
        let gpa_last = u128::from(wanted.gpa.0) + u128::from(last - first);
        let gpa_bits = match self.encoding.format {
            Format::X86FirstStage => 52,
            Format::Vmsav8Stage1 => 48,
        };
        if last > self.levels.last_address().0 || gpa_last >> gpa_bits != 0 {
            return Err(MapRefusal::OutOfRange);
        }
        let base = self.encoding.base;
        let in_arena =
            u128::from(base) <= gpa_last && wanted.gpa.0 < base + self.frames_total * PAGE;
        if base != 0 && in_arena {
            return Err(MapRefusal::TargetsTables);
        }
        if let Some(found) = self.overlapping(wanted.range).next() {
            return Err(MapRefusal::Overlap(found.range));
        }
        let tables = self.tables_of(wanted);
        let new = |table: &&(u32, u64)| !self.tables.contains_key(table);
        let (needed, free) = (tables.iter().filter(new).count() as u64, self.free());
        if needed > free {
            return Err(MapRefusal::OutOfFrames(OutOfFrames { needed, free }));
        }
        for table in tables {
            *self.tables.entry(table).or_default() += 1;
        }
        self.bytes += last - first + 1;
        self.mappings.insert(first, *wanted);
        Ok(())
    }

    pub fn unmap(&mut self, wanted: IovaRange) -> Result<Unmapped, WouldSplit> {
        let cut = |found: &&Mapping| !wanted.covers(found.range);
        if let Some(found) = self.overlapping(wanted).find(cut) {
            return Err(WouldSplit(found.range));
        }
        let gone: Vec<Mapping> = self.overlapping(wanted).copied().collect();
        let mut unmapped = Unmapped::default();
        for mapping in gone {
            unmapped.mappings += 1;
            unmapped.bytes += mapping.range.span() + 1;
            self.mappings.remove(&mapping.range.first().0);
            for table in self.tables_of(&mapping) {
                let users = self.tables.get_mut(&table).expect("counted");
                *users -= 1;
                if *users == 0 {
                    self.tables.remove(&table);
                    self.retired += 1;
                }
            }
        }
        self.bytes -= unmapped.bytes;
        Ok(unmapped)
    }

    pub fn translate(&self, iova: u64) -> Option<Translation> {
        let found = self.at(iova)?;
        let gpa = found.gpa.0 + (iova - found.range.first().0);
        let inside = |bytes: u64| {
            let (first, last) = (iova & !(bytes - 1), iova | (bytes - 1));
            (gpa ^ iova) & (bytes - 1) == 0
                && found.range.contains(Iova(first))
                && found.range.contains(Iova(last))
        };
        let bytes = [GIB, MIB2, PAGE].into_iter().find(|bytes| inside(*bytes));
        Some(Translation {
            gpa: Gpa(gpa),
            contiguous_last: Iova(iova | (bytes.expect("a page") - 1)),
            access: found.access,
            mmio: found.mmio,
        })
    }
}
