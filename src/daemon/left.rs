//! The memory that outlives the daemon: the page tables and the store of each life, and their names with the keeper.

use std::os::fd::AsFd;

use log::{info, warn};

use crate::endpoints::passthrough::discard_devices;
use crate::iommu::{Iommu, Predecessor};
use crate::page_table::ArenaError;
use crate::page_table::words::{MappedWords, sealed_size};
use crate::process::keeper::Keeper;
use crate::store::newest;

/// The names of the two memfds of a life begin with these, and end with its number.
const ARENA: &str = "arena.";
const STORE: &str = "store.";

/// The page tables and the store that the daemon before has left.
pub(super) struct LeftMemory {
    arena: MappedWords,
    store: MappedWords,
}

impl LeftMemory {
    /// Finds what the last life has left, among all that the keeper has. `None` if there is nothing that can be mapped. If no
    /// store is complete, returns that of the last life, so that the restore says what is wrong with it.
    pub(super) fn find(keeper: &Keeper) -> Option<Self> {
        let mut found = Vec::new();
        for life in lives(keeper, STORE) {
            match Self::map(keeper, life) {
                Ok(left) => found.push(left),
                Err(cause) => warn!("the state of life {life} cannot be read: {cause}"),
            }
        }
        let stores: Vec<_> = found.iter().map(|left| left.store.as_slice()).collect();
        match newest(&stores) {
            Some(newest) => Some(found.swap_remove(newest)),
            None => found.pop(),
        }
    }

    fn map(keeper: &Keeper, life: u64) -> Result<Self, ArenaError> {
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        let map = |name: &str, protection| {
            let file = keeper
                .claim(name)
                .ok_or(ArenaError::NotAnArena("the keeper does not have it"))?;
            let bytes = sealed_size(file.as_fd())?;
            MappedWords::map(file.as_fd(), bytes, protection)
        };
        Ok(Self {
            arena: map(&format!("{ARENA}{life}"), libc::PROT_READ)?,
            // Deaths are counted in it.
            store: map(&format!("{STORE}{life}"), writable)?,
        })
    }

    pub(super) fn predecessor(&self) -> Predecessor<'_> {
        Predecessor {
            arena: self.arena.as_slice(),
            store: self.store.as_slice(),
        }
    }
}

/// The names under which the memory of this life is kept.
pub(super) struct KeptMemory {
    arena: String,
    store: String,
}

impl KeptMemory {
    /// Keeps the memory of `iommu`. It must not have served anything yet.
    ///
    /// # Errors
    /// See [`Keeper::keep_as`].
    pub(super) fn keep(keeper: &Keeper, iommu: &Iommu) -> std::io::Result<Self> {
        let last = lives(keeper, STORE).pop().max(lives(keeper, ARENA).pop());
        let life = last.map_or(1, |last| last.saturating_add(1));
        let kept = Self {
            arena: format!("{ARENA}{life}"),
            store: format!("{STORE}{life}"),
        };
        // The store last: a process that finds a store relies on its arena.
        keeper.keep_as(&kept.arena, iommu.arena().fd())?;
        keeper.keep_as(&kept.store, iommu.store().fd())?;
        Ok(kept)
    }

    /// Lets the memory of all earlier lives go. The state must have been taken over, or refused.
    pub(super) fn release_earlier(&self, keeper: &Keeper) {
        let names = keeper.names();
        let is_earlier = |name: &&String| {
            (name.starts_with(ARENA) || name.starts_with(STORE))
                && **name != self.arena
                && **name != self.store
        };
        // The stores first: a process that finds a store relies on its arena.
        let (stores, arenas): (Vec<_>, Vec<_>) = names
            .iter()
            .filter(is_earlier)
            .partition(|name| name.starts_with(STORE));
        for name in stores.into_iter().chain(arenas) {
            // However often it was claimed.
            keeper.drop_file(name);
        }
    }
}

/// Keeps the state of `iommu` for the next process. Without a keeper, or if it does not take the state, the state ends with
/// this process.
pub(super) fn keep_state(keeper: &Keeper, iommu: &mut Iommu) -> Option<KeptMemory> {
    if !keeper.is_present() {
        return None;
    }
    iommu.keep_journal();
    match KeptMemory::keep(keeper, iommu) {
        Ok(kept) => Some(kept),
        Err(cause) => {
            warn!(
                "the state of this daemon ends with it, because {cause}; let the service manager keep more descriptors \
                 (FileDescriptorStoreMax= of the unit)"
            );
            None
        }
    }
}

/// The numbers of the lives that have left a file of this kind, in ascending order.
fn lives(keeper: &Keeper, kind: &str) -> Vec<u64> {
    let names = keeper.names();
    let numbers = names.iter().filter_map(|name| name.strip_prefix(kind));
    let mut numbers: Vec<u64> = numbers.filter_map(|life| life.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

/// Closes the devices that the process before has left if it has left no state: nobody knows their address spaces.
pub(super) fn discard_orphans(keeper: &Keeper) {
    if !lives(keeper, STORE).is_empty() {
        return;
    }
    let names = discard_devices(keeper);
    if !names.is_empty() {
        warn!(
            "the daemon before has left devices, but no state of the guest's IOMMU: they are opened anew ({})",
            names.join(", ")
        );
    }
}

/// Says that the process before has left things that nobody takes over, and lets them go.
pub(super) fn release_unclaimed(keeper: &Keeper) {
    let names = keeper.release_unclaimed();
    if !names.is_empty() {
        info!(
            "the daemon before has left {} descriptors that this one does not use: {}",
            names.len(),
            names.join(", ")
        );
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::address::PageMask;
    use crate::iommu::Settings;
    use crate::page_table::Encoding;
    use crate::topology::{ReservedRegions, Topology};

    fn core() -> Iommu {
        let settings = Settings {
            address_width: 48,
            page_sizes: PageMask::TABLE,
            last_domain: 15,
            bypass_at_boot: true,
            arena_limit: 1 << 20,
            encoding: Encoding::default(),
        };
        let reserved = ReservedRegions::new(Vec::new()).expect("no region");
        let at = "00:05.0".parse().expect("an address");
        let topology = Topology::new(at, reserved, &[]).expect("a topology");
        Iommu::new(settings, topology).expect("memory")
    }

    /// A manager that reads nothing keeps what fits into its socket.
    fn keeper(left: &[(&str, std::os::fd::BorrowedFd<'_>)]) -> (UnixDatagram, Keeper) {
        let (manager, ours) = UnixDatagram::pair().expect("sockets");
        let left = left.iter().map(|(name, file)| {
            let file = file.try_clone_to_owned().expect("a descriptor");
            ((*name).to_owned(), file)
        });
        (manager, Keeper::new(ours, left).expect("a keeper"))
    }

    #[test]
    fn the_memory_of_each_life_has_its_number_and_the_earlier_ones_go() {
        let (first, second) = (core(), core());
        let (_manager, keeper) = keeper(&[
            ("arena.7", first.arena().fd()),
            ("store.7", first.store().fd()),
            ("vmm", first.store().fd()),
        ]);
        let kept = KeptMemory::keep(&keeper, &second).expect("kept");
        assert_eq!((&*kept.arena, &*kept.store), ("arena.8", "store.8"));
        kept.release_earlier(&keeper);
        assert_eq!(keeper.names(), ["arena.8", "store.8", "vmm"]);
    }

    #[test]
    fn the_complete_store_of_the_last_life_is_found() {
        let (mut first, mut second) = (core(), core());
        first.keep_journal();
        second.keep_journal();
        let (_manager, keeper) = keeper(&[
            ("arena.1", first.arena().fd()),
            ("store.1", first.store().fd()),
            // Its store is missing: the process died in between.
            ("arena.2", second.arena().fd()),
        ]);
        let left = LeftMemory::find(&keeper).expect("left");
        assert_eq!(
            left.store.as_slice().len(),
            first.store().memory().words().len()
        );
    }

    #[test]
    fn devices_without_a_state_are_closed() {
        let first = core();
        let fd = first.store().fd();
        let devices = [("iommufd", fd), ("vfio.0000-65-00.0", fd), ("vmm", fd)];
        let (_manager, alone) = keeper(&devices);
        discard_orphans(&alone);
        assert_eq!(alone.names(), ["vmm"]);
        let (_manager, with_state) = keeper(&[&devices[..], &[("store.1", fd)]].concat());
        discard_orphans(&with_state);
        assert_eq!(with_state.names().len(), 4);
    }

    #[test]
    fn damaged_memory_is_not_taken() {
        let plain = std::fs::File::from(
            rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd"),
        );
        plain.set_len(4096).expect("room");
        let mut first = core();
        first.keep_journal();
        for left in [
            // Not sealed; no arena; nothing.
            vec![("arena.1", first.arena().fd()), ("store.1", plain.as_fd())],
            vec![("store.1", first.store().fd())],
            vec![],
        ] {
            let (_manager, keeper) = keeper(&left);
            assert!(LeftMemory::find(&keeper).is_none());
        }
    }
}
