//! The tables that the RSDP leads to, each of them checked (ACPI specification, section "System Description Table
//! Header").

use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::refusal::{AcpiRefusal, MAX_TABLES, MAX_TOTAL_LEN, TableProblem};
use super::rsdp::{Rsdp, sum};

const HEADER_LEN: usize = 36;
pub(super) const LENGTH_AT: usize = 4;
const REVISION_AT: usize = 8;
pub(super) const CHECKSUM_AT: usize = 9;
/// The FACS has a header of its own, without a checksum.
const FACS_LEN: u32 = 64;

/// A range of guest-physical addresses that is not empty. `end` is the first address behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TableSpan {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl TableSpan {
    pub(super) fn from_len(start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (len > 0).then_some(Self { start, end })
    }

    pub(super) fn len(self) -> u64 {
        self.end - self.start
    }
}

/// The root table: XSDT or RSDT.
#[derive(Clone, Debug)]
pub(super) struct Root {
    pub(super) span: TableSpan,
    /// All of it.
    pub(super) bytes: Vec<u8>,
    /// Bytes of an entry: 8 of an XSDT, 4 of an RSDT.
    pub(super) entry_len: usize,
}

/// All tables.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    pub(super) root: Root,
    /// The RSDP if it is in RAM, the root table, the tables that it names, and those that the FADT names; sorted and disjoint.
    spans: Vec<TableSpan>,
    /// The address of a VIOT table.
    pub(super) viot: Option<u64>,
    /// The root table has a correct checksum only without its last entry, and `root` is without it. This is why the table as
    /// it is would be refused.
    pub(super) interrupted: Option<AcpiRefusal>,
}

impl Tables {
    /// Follows and checks all tables. The work is bounded by [`MAX_TABLES`] and [`MAX_TOTAL_LEN`].
    pub(super) fn follow<M: GuestMemory + ?Sized>(
        memory: &M,
        rsdp: &Rsdp,
    ) -> Result<Self, AcpiRefusal> {
        Self::follow_root(memory, rsdp, None).or_else(|cause| {
            let interrupted = Self::follow_root(memory, rsdp, Some(cause));
            interrupted.map_err(|_| cause)
        })
    }

    /// Follows the root table, without its last entry if the table with that entry is refused.
    fn follow_root<M: GuestMemory + ?Sized>(
        memory: &M,
        rsdp: &Rsdp,
        interrupted: Option<AcpiRefusal>,
    ) -> Result<Self, AcpiRefusal> {
        let mut walk = TableWalk {
            memory,
            spans: Vec::new(),
            total_len: 0,
        };
        // No table can overlap an RSDP that is not in RAM, and none can follow it.
        if rsdp.is_in_ram() {
            let rsdp_len = rsdp.bytes().len() as u64;
            walk.spans.extend(TableSpan::from_len(rsdp.at(), rsdp_len));
        }
        let root = walk.root(rsdp, interrupted.is_some())?;
        let viot = walk.children(&root)?;
        let spans = disjoint(walk.spans)?;
        Ok(Self {
            root,
            spans,
            viot,
            interrupted,
        })
    }

    /// The end of the table at the highest address.
    pub(super) fn last_end(&self) -> u64 {
        self.spans.last().map_or(0, |span| span.end)
    }

    /// A table that shares bytes with `span`.
    pub(super) fn overlapping(&self, span: TableSpan) -> Option<TableSpan> {
        let mut spans = self.spans.iter();
        spans
            .find(|other| other.start < span.end && span.start < other.end)
            .copied()
    }
}

struct TableWalk<'a, M: ?Sized> {
    memory: &'a M,
    spans: Vec<TableSpan>,
    total_len: u64,
}

impl<M: GuestMemory + ?Sized> TableWalk<'_, M> {
    fn root(&mut self, rsdp: &Rsdp, is_interrupted: bool) -> Result<Root, AcpiRefusal> {
        let (at, signature, entry_len) = match (rsdp.xsdt(), rsdp.rsdt()) {
            (Some(at), _) => (at, *b"XSDT", 8),
            (None, Some(at)) => (at, *b"RSDT", 4),
            (None, None) => return Err(AcpiRefusal::NoRootTable { at: rsdp.at() }),
        };
        let dropped = if is_interrupted { entry_len } else { 0 };
        let bytes = self.table_without(at, dropped)?;
        let refuse = |problem| AcpiRefusal::Table { at, problem };
        if !bytes.starts_with(&signature) {
            return Err(refuse(TableProblem::Signature(signature_of(&bytes))));
        }
        if bytes[REVISION_AT] != 1 {
            return Err(refuse(TableProblem::Revision(bytes[REVISION_AT])));
        }
        let span =
            TableSpan::from_len(at, bytes.len() as u64).ok_or(refuse(TableProblem::NotRam))?;
        let entries = bytes.len() - HEADER_LEN;
        if !entries.is_multiple_of(entry_len) {
            return Err(refuse(TableProblem::Length(length_of(&bytes))));
        }
        let count = entries / entry_len;
        if count > MAX_TABLES {
            return Err(AcpiRefusal::TooManyTables { at, count });
        }
        Ok(Root {
            span,
            bytes,
            entry_len,
        })
    }

    /// Checks the tables that the root table names, and returns the address of a VIOT.
    fn children(&mut self, root: &Root) -> Result<Option<u64>, AcpiRefusal> {
        let mut viot = None;
        for entry in root.bytes[HEADER_LEN..].chunks_exact(root.entry_len) {
            let mut address = [0; 8];
            address[..entry.len()].copy_from_slice(entry);
            let at = u64::from_le_bytes(address);
            let bytes = self.table(at)?;
            match &signature_of(&bytes) {
                b"FACP" => self.named_by_fadt(&bytes)?,
                b"VIOT" => viot = viot.or(Some(at)),
                _ => {}
            }
        }
        Ok(viot)
    }

    /// Checks the DSDT and the FACS. The 64-bit field of each counts if it is not 0.
    fn named_by_fadt(&mut self, fadt: &[u8]) -> Result<(), AcpiRefusal> {
        let short = |at: usize| {
            let field = fadt.get(at..at + 4).and_then(|field| field.try_into().ok());
            field.map_or(0, |field| u64::from(u32::from_le_bytes(field)))
        };
        let long = |at: usize| {
            let field = fadt.get(at..at + 8).and_then(|field| field.try_into().ok());
            field.map_or(0, u64::from_le_bytes)
        };
        let named = |wide: u64, narrow: u64| if wide == 0 { narrow } else { wide };
        let (facs, dsdt) = (named(long(132), short(36)), named(long(140), short(40)));
        if facs != 0 {
            self.facs(facs)?;
        }
        if dsdt != 0 {
            let at = dsdt;
            let found = signature_of(&self.table(at)?);
            if found != *b"DSDT" {
                let problem = TableProblem::Signature(found);
                return Err(AcpiRefusal::Table { at, problem });
            }
        }
        Ok(())
    }

    fn facs(&mut self, at: u64) -> Result<(), AcpiRefusal> {
        let header = self.read(at, 8)?;
        let refuse = |problem| AcpiRefusal::Table { at, problem };
        if !header.starts_with(b"FACS") {
            return Err(refuse(TableProblem::Signature(signature_of(&header))));
        }
        let length = length_of(&header);
        if length < FACS_LEN {
            return Err(refuse(TableProblem::Length(length)));
        }
        self.take(at, length)?;
        self.read(at, u64::from(length)).map(drop)
    }

    /// All bytes of a table with a header.
    fn table(&mut self, at: u64) -> Result<Vec<u8>, AcpiRefusal> {
        self.table_without(at, 0)
    }

    /// A table as it was before it became `dropped` bytes longer.
    fn table_without(&mut self, at: u64, dropped: usize) -> Result<Vec<u8>, AcpiRefusal> {
        let shorten = |mut header: Vec<u8>| {
            let dropped = u32::try_from(dropped).unwrap_or(u32::MAX);
            let length = length_of(&header).saturating_sub(dropped);
            header[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&length.to_le_bytes());
            header
        };
        let header = shorten(self.read(at, HEADER_LEN as u64)?);
        let length = length_of(&header);
        let refuse = |problem| AcpiRefusal::Table { at, problem };
        let is_name =
            |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b'_';
        if !header[..4].iter().all(is_name) {
            return Err(refuse(TableProblem::Signature(signature_of(&header))));
        }
        if usize::try_from(length).is_ok_and(|length| length < HEADER_LEN) {
            return Err(refuse(TableProblem::Length(length)));
        }
        self.take(at, length)?;
        let bytes = shorten(self.read(at, u64::from(length))?);
        // The guest may have written to it since.
        if bytes[..HEADER_LEN] != header[..] || sum(&bytes) != 0 {
            return Err(refuse(TableProblem::Checksum));
        }
        Ok(bytes)
    }

    /// Counts a table against the limits, before its bytes are read.
    fn take(&mut self, at: u64, length: u32) -> Result<(), AcpiRefusal> {
        self.total_len += u64::from(length);
        if self.total_len > MAX_TOTAL_LEN {
            return Err(AcpiRefusal::TooLong);
        }
        let problem = TableProblem::NotRam;
        let span =
            TableSpan::from_len(at, u64::from(length)).ok_or(AcpiRefusal::Table { at, problem })?;
        self.spans.push(span);
        Ok(())
    }

    fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, AcpiRefusal> {
        let problem = TableProblem::NotRam;
        let not_ram = AcpiRefusal::Table { at, problem };
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| not_ram)?];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .map_err(|_| not_ram)?;
        Ok(bytes)
    }
}

/// The spans in ascending order.
fn disjoint(mut spans: Vec<TableSpan>) -> Result<Vec<TableSpan>, AcpiRefusal> {
    spans.sort_unstable();
    let mut pairs = spans.windows(2);
    match pairs.find(|pair| pair[1].start < pair[0].end) {
        Some(pair) => Err(AcpiRefusal::Overlap {
            first: pair[0].start,
            second: pair[1].start,
        }),
        None => Ok(spans),
    }
}

fn signature_of(table: &[u8]) -> [u8; 4] {
    [table[0], table[1], table[2], table[3]]
}

fn length_of(table: &[u8]) -> u32 {
    u32::from_le_bytes([table[4], table[5], table[6], table[7]])
}
