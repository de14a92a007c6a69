//! Records of the kernel's objects, which outlive this process together with the objects. From them, the backend of a later
//! process knows which object is for what.

use std::sync::Arc;

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectRecord {
    /// The backend, by a number that is the same in each life.
    pub owner: u64,
    /// The object. No two records of one owner have the same.
    pub object: u64,
    /// Its state, below bit 48. It changes in one store.
    pub state: u64,
}

/// The place of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordId(pub u32);

/// Keeps records. Each call takes effect as a whole, or not at all if the process dies meanwhile.
pub trait ObjectRecords: Send + Sync {
    /// Adds a record. `None` if there is no room: a later process will not find the object, and makes a new one.
    fn add(&self, record: ObjectRecord) -> Option<RecordId>;

    /// Changes the state of a record to that of `record`, which is otherwise the same.
    fn set_state(&self, id: RecordId, record: ObjectRecord);

    /// Removes a record.
    fn remove(&self, id: RecordId);
}

/// The records of one backend.
pub(super) struct Ledger {
    records: Option<Arc<dyn ObjectRecords>>,
    owner: u64,
}

/// A record in a [`Ledger`].
#[derive(Debug)]
pub(super) struct Noted {
    id: RecordId,
    record: ObjectRecord,
}

impl Noted {
    /// The state.
    pub(super) fn state(&self) -> u64 {
        self.record.state
    }

    /// The object.
    pub(super) fn object(&self) -> u64 {
        self.record.object
    }
}

impl Ledger {
    /// Without records: nothing outlives this process.
    pub(super) fn none(owner: u64) -> Self {
        Self {
            records: None,
            owner,
        }
    }

    /// Whose records these are.
    pub(super) fn owner(&self) -> u64 {
        self.owner
    }

    /// Keeps records from now on.
    pub(super) fn begin(&mut self, records: Arc<dyn ObjectRecords>) {
        self.records = Some(records);
    }

    /// Keeps no records from now on.
    pub(super) fn end(&mut self) {
        self.records = None;
    }

    /// Records an object.
    pub(super) fn note(&self, object: u64, state: u64) -> Option<Noted> {
        let record = ObjectRecord {
            owner: self.owner,
            object,
            state,
        };
        let id = self.records.as_ref()?.add(record)?;
        Some(Noted { id, record })
    }

    /// Records another state.
    pub(super) fn update(&self, noted: &mut Noted, state: u64) {
        if noted.record.state != state
            && let Some(records) = &self.records
        {
            noted.record.state = state;
            records.set_state(noted.id, noted.record);
        }
    }

    /// Removes a record.
    pub(super) fn forget(&self, noted: &Noted) {
        if let Some(records) = &self.records {
            records.remove(noted.id);
        }
    }

    /// A record that an earlier process has made.
    pub(super) fn left(&self, id: RecordId, record: ObjectRecord) -> Noted {
        Noted { id, record }
    }
}
