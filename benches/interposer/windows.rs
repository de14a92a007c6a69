//! Removal of many windows, with a server that is told each mapping: one UNMAP of all, and ATTACH to another domain.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use vhost_device_iommu::address::IovaRange;
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::ids::DomainId;

use crate::bed::Bed;
use crate::connection::{Connection, DMA_MAP, DMA_UNMAP, Msg};
use crate::mappings::page_mapping;
use crate::{ROUNDS, median};

const WINDOWS: u64 = 10_000;
/// The flag of DMA_UNMAP that removes all windows.
const UNMAP_ALL: u32 = 2;

/// Milliseconds, and messages to the server, of each removal.
pub fn measure() -> Vec<(&'static str, f64)> {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    let told = Arc::new(AtomicU64::new(0));
    let mut server = Windows(HashSet::new());
    let counter = told.clone();
    let (client, scripted) = bed.pair(move |connection, msg| {
        counter.fetch_add(1, Ordering::Relaxed);
        server.answer(connection, msg)
    });
    let mut domain = DomainId(1);
    let (mut unmap_ms, mut attach_ms, mut unmap_msgs, mut attach_msgs) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let timed = |ms: &mut Vec<f64>, msgs: &mut Vec<f64>, act: &mut dyn FnMut()| {
        let (before, begin) = (told.load(Ordering::Relaxed), Instant::now());
        act();
        ms.push(begin.elapsed().as_secs_f64() * 1e3);
        msgs.push((told.load(Ordering::Relaxed) - before) as f64);
    };
    for _ in 0..ROUNDS {
        map_all(&bed, domain);
        timed(&mut unmap_ms, &mut unmap_msgs, &mut || {
            let unmapped = bed.iommu().unmap(domain, IovaRange::ALL);
            unmapped.expect("unmapped");
        });
        map_all(&bed, domain);
        timed(&mut attach_ms, &mut attach_msgs, &mut || {
            domain = DomainId(3 - domain.0);
            let attached = bed.iommu().attach(bed.endpoint(), domain, false);
            attached.expect("attached");
        });
        scripted.received.lock().unwrap().clear();
    }
    drop(client);
    let names = [
        "windows_unmap_ms",
        "windows_unmap_messages",
        "windows_attach_ms",
        "windows_attach_messages",
    ];
    let all = [unmap_ms, unmap_msgs, attach_ms, attach_msgs];
    let medians = all
        .into_iter()
        .filter_map(|mut figures| median(&mut figures));
    names.into_iter().zip(medians).collect()
}

fn map_all(bed: &Bed, domain: DomainId) {
    let all: Vec<_> = (0..WINDOWS).map(page_mapping).collect();
    for run in all.chunks(256) {
        let mut outcomes = VecDeque::new();
        bed.iommu().map_all(domain, run, &mut outcomes);
        assert!(outcomes.iter().all(Result::is_ok), "mapped");
    }
}

/// The first addresses of the windows of a server.
struct Windows(HashSet<u64>);

impl Windows {
    /// Answers as libvfio-user does, which refuses to remove a window that it does not have. Returns whether the message is
    /// answered.
    fn answer(&mut self, connection: &mut Connection, msg: &Msg) -> bool {
        let is_known = match msg.cmd {
            DMA_MAP => self.0.insert(msg.u64_at(16)),
            DMA_UNMAP if msg.u32_at(4) == UNMAP_ALL => {
                self.0.clear();
                true
            }
            DMA_UNMAP => self.0.remove(&msg.u64_at(8)),
            _ => true,
        };
        if !is_known {
            connection.refuse(msg, libc::ENOENT.unsigned_abs());
        }
        !is_known
    }
}
