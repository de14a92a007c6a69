//! A guest whose driver goes on from one life of the daemon to the next.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::FrontendReq as Req;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::Steps;
use super::bed::{Life, Manager, Sent, Socket, Vmm, event, memfd, wait_for};
use crate::address::{Access, Iova};
use crate::device::Device;
use crate::device::plain_ring::{AVAIL_AT, USED_AT};
use crate::device::testing::{
    DriverRing, ENDPOINT, RING_SIZE, attach, map, mortal_device, successor, unmap,
};
use crate::faults::{Fault, FaultReason};
use crate::protocol::reply::{Status, TAIL_LEN};
use crate::protocol::wire::VIRTIO_IOMMU_F_MAP_UNMAP;
use crate::transport::vhost_user::LeftVmm;

const USER: u64 = 0x7000_0000;
const RAM: u64 = 0x10_0000;
const RINGS: [u64; 2] = [0x1_0000, 0x2_0000];
const OK: u8 = Status::Ok as u8;

/// A guest, its VMM, and the daemon's present life.
struct Machine {
    socket: Socket,
    manager: Manager,
    device: Arc<Device>,
    life: Option<Life>,
    vmm: Vmm,
    ram: Arc<OwnedFd>,
    memory: Arc<GuestMemoryMmap>,
    requests: DriverRing,
    events: DriverRing,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
}

impl Machine {
    /// A guest whose driver runs.
    fn boot() -> Self {
        let ram = memfd(RAM);
        let file = File::from(ram.try_clone().expect("a copy"));
        let range = (
            GuestAddress(0),
            usize::try_from(RAM).expect("small"),
            Some(FileOffset::new(file, 0)),
        );
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).expect("memory");
        let memory = Arc::new(memory);
        let (socket, mut manager) = (Socket::new(), Manager::new());
        let device = mortal_device();
        let keeper = manager.keeper();
        let life = Life::start(&socket, device.clone(), keeper, Steps::default(), None);
        let mut machine = Self {
            vmm: socket.connect(),
            requests: DriverRing::new(memory.clone(), RINGS[0]),
            events: DriverRing::new(memory.clone(), RINGS[1]),
            life: Some(life),
            kick: event(),
            call: event(),
            socket,
            manager,
            device,
            ram,
            memory,
        };
        let features = [VIRTIO_F_VERSION_1, VIRTIO_IOMMU_F_MAP_UNMAP];
        let features = features.iter().fold(1 << 30, |bits, bit| bits | 1 << bit);
        for sent in [
            Sent::new(Req::SET_OWNER, &[]),
            Sent::new(Req::GET_FEATURES, &[]),
            Sent::words(Req::SET_PROTOCOL_FEATURES, &[0xa209]),
            Sent::words(Req::SET_FEATURES, &[features]).acked(),
        ] {
            machine.vmm.tell(&sent).expect("served");
        }
        machine.share_memory();
        machine.start_rings([0, 0]);
        machine
    }

    fn share_memory(&mut self) {
        let table = Sent::words(Req::SET_MEM_TABLE, &[1, 0, RAM, USER, 0]);
        let table = table.with(&[&self.ram]).acked();
        self.vmm.tell(&table).expect("served");
    }

    fn start_rings(&mut self, bases: [u32; 2]) {
        for (index, (at, base)) in (0..).zip(RINGS.into_iter().zip(bases)) {
            let at = USER + at;
            let mut addresses = u64::from(index).to_ne_bytes().to_vec();
            for address in [at, at + USED_AT, at + AVAIL_AT, 0] {
                addresses.extend(address.to_ne_bytes());
            }
            let number = u64::from(index);
            for sent in [
                Sent::ring(Req::SET_VRING_NUM, index, RING_SIZE.into()),
                Sent::ring(Req::SET_VRING_BASE, index, base),
                Sent::new(Req::SET_VRING_ADDR, &addresses).acked(),
                Sent::words(Req::SET_VRING_CALL, &[number]).with(&[&self.call]),
                Sent::words(Req::SET_VRING_KICK, &[number]).with(&[&self.kick]),
                Sent::ring(Req::SET_VRING_ENABLE, index, 1).acked(),
            ] {
                self.vmm.tell(&sent).expect("served");
            }
        }
    }

    fn stop_rings(&mut self) -> [u32; 2] {
        [0, 1].map(|index| {
            // As QEMU and crosvm do.
            let disable = Sent::ring(Req::SET_VRING_ENABLE, index, 0);
            self.vmm.tell(&disable).expect("served");
            let stop = Sent::ring(Req::GET_VRING_BASE, index, 0);
            let reply = self.vmm.tell(&stop).expect("served").expect("a reply");
            u32::from_ne_bytes(reply[16..20].try_into().expect("4 bytes"))
        })
    }

    /// The daemon ends.
    fn end_life(&mut self) {
        self.life.take().expect("a life").stop();
    }

    /// The next one takes over.
    fn begin_life(&mut self) {
        let keeper = self.manager.keeper();
        let left = LeftVmm::find(&keeper).expect("a VMM").expect("all of it");
        // Descriptors of events that were replaced not long ago.
        let idle = keeper.release_unclaimed();
        assert!(idle.len() <= 8, "{idle:?}");
        assert!(
            idle.iter().all(|name| name.starts_with("file.")),
            "{idle:?}"
        );
        let (device, restore) = successor(&self.device);
        self.device = device.clone();
        let left = Some((left, restore));
        let life = Life::start(&self.socket, device, keeper, Steps::default(), left);
        self.life = Some(life);
    }

    /// Puts a request into the ring, and kicks.
    fn submit(&mut self, request: &[u8]) -> u32 {
        let head = self.requests.put(request, TAIL_LEN);
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).expect("kicked");
        head
    }

    /// Waits for the answer to the request that was submitted last.
    fn status(&mut self, head: u32) -> u8 {
        let mut used = None;
        wait_for("an answer", || {
            used = self.requests.take_used();
            used.is_some()
        });
        assert_eq!(used, Some((head, 4)));
        self.requests.written(head)[0]
    }

    fn request(&mut self, request: &[u8]) -> u8 {
        let head = self.submit(request);
        self.status(head)
    }

    /// Interrupts since the last call.
    fn interrupts(&self) -> u64 {
        let mut bytes = [0; 8];
        let read = rustix::io::read(&self.call, &mut bytes);
        read.map_or(0, |_| u64::from_ne_bytes(bytes))
    }
}

#[test]
fn a_driver_goes_on_and_no_kick_is_lost() {
    let mut machine = Machine::boot();
    assert_eq!(machine.request(&attach(1)), OK);
    for life in 1..4u64 {
        assert_eq!(machine.request(&map(1, life << 12)), OK);
        machine.interrupts();
        machine.end_life();
        let head = machine.submit(&map(1, life << 20));
        machine.begin_life();
        // Nobody kicks again.
        assert_eq!(machine.status(head), OK);
        wait_for("an interrupt", || machine.interrupts() > 0);
        assert_eq!(machine.request(&unmap(1, life << 12)), OK);
    }
}

#[test]
fn a_paused_driver_resumes_at_the_next_life() {
    let mut machine = Machine::boot();
    assert_eq!(machine.request(&attach(1)), OK);
    assert_eq!(machine.request(&map(1, 0x1000)), OK);
    let bases = machine.stop_rings();
    assert_eq!(bases, [2, 0]);
    machine.end_life();
    machine.begin_life();
    machine.share_memory();
    machine.start_rings(bases);
    // The same address cannot be mapped twice.
    assert_eq!(machine.request(&map(1, 0x1000)), Status::Inval as u8);
    assert_eq!(machine.stop_rings(), [3, 0]);
}

#[test]
fn a_guest_that_resets_between_two_lives_starts_anew() {
    let mut machine = Machine::boot();
    assert_eq!(machine.request(&attach(1)), OK);
    assert_eq!(machine.request(&map(1, 0x1000)), OK);
    machine.stop_rings();
    machine.end_life();
    machine.begin_life();
    machine.requests = DriverRing::new(machine.memory.clone(), RINGS[0]);
    machine.requests.clear();
    machine.share_memory();
    machine.start_rings([0, 0]);
    assert_eq!(machine.request(&unmap(1, 0x1000)), Status::NoEnt as u8);
    assert_eq!(machine.request(&attach(1)), OK);
}

/// As a VMM does that unplugs memory while the guest is paused.
#[test]
fn a_stopped_ring_whose_memory_is_gone_does_not_cost_the_connection() {
    let mut machine = Machine::boot();
    assert_eq!(machine.request(&attach(1)), OK);
    let bases = machine.stop_rings();
    let other = memfd(RAM);
    let table = Sent::words(Req::SET_MEM_TABLE, &[1, RAM, RAM, USER, 0]);
    let table = table.with(&[&other]).acked();
    machine.vmm.tell(&table).expect("served");
    for _ in 0..2 {
        machine.end_life();
        machine.begin_life();
        // The answer shows that this life has taken over.
        let question = Sent::new(Req::GET_FEATURES, &[]);
        machine.vmm.tell(&question).expect("served");
    }
    machine.share_memory();
    machine.start_rings(bases);
    // The same driver: it is still attached.
    assert_eq!(machine.request(&map(1, 0x1000)), OK);
}

/// The next life stops the ring at the index that the requests of all lives have reached.
#[test]
fn a_ring_is_stopped_where_it_really_is() {
    let mut machine = Machine::boot();
    for life in 0..3 {
        assert_eq!(machine.request(&attach(1)), OK);
        machine.end_life();
        machine.begin_life();
        let bases = machine.stop_rings();
        assert_eq!(bases, [life + 1, 0]);
        machine.start_rings(bases);
    }
}

#[test]
fn a_fault_goes_into_the_next_event_buffer() {
    let mut machine = Machine::boot();
    for _ in 0..3 {
        machine.events.put(&[], 0x40);
    }
    for life in 0..3u32 {
        assert_eq!(machine.request(&attach(1)), OK);
        let fault = Fault {
            reason: FaultReason::Mapping,
            endpoint: ENDPOINT,
            access: Access::WRITE,
            address: Iova(0x1000 + u64::from(life)),
        };
        machine.device.report_fault(&fault);
        let (head, len) = machine.events.take_used().expect("delivered");
        assert_eq!((head, len), (2 * life, 24));
        let record = machine.events.written(head);
        let address = u64::from_le_bytes(record[16..24].try_into().expect("8 bytes"));
        assert_eq!(address, 0x1000 + u64::from(life));
        machine.end_life();
        machine.begin_life();
    }
}
