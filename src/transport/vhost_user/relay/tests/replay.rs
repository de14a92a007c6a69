//! Random messages to the crate, and what a new crate is told of them: both must be in the same state.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};

use proptest::prelude::*;
use vhost::vhost_user::message::{
    FrontendReq as Req, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::link::{CrateLink, Verdict};
use super::super::message::MessageBytes;
use super::super::state::{Dropper, VmmState};
use super::super::told::Told;
use super::bed::{HANG, Sent, event, memfd};
use crate::device::{Device, MAX_QUEUE_SIZE, QUEUES};
use crate::process::connector::private_connection;

const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
const USER: u64 = 0x7000_0000;
const RAM: u64 = 0x10_0000;
const LOOK: u16 = 3;

/// A backend whose state the test sees.
#[derive(Default)]
struct Spy {
    memory: Mutex<Vec<(u64, u64)>>,
    features: Mutex<u64>,
    rings: Mutex<Option<mpsc::Sender<Vec<VringRwLock>>>>,
}

impl VhostUserBackend for Spy {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        PROTOCOL | Device::offered_features()
    }

    fn acked_features(&self, features: u64) {
        *self.features.lock().expect("features") = features;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::all()
    }

    fn reset_device(&self) {
        *self.features.lock().expect("features") = 0;
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        let memory = memory.memory();
        let regions = memory.iter().map(|r| (r.start_addr().0, r.len()));
        *self.memory.lock().expect("memory") = regions.collect();
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        rings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        if event == LOOK
            && let Some(sender) = self.rings.lock().expect("rings").take()
        {
            sender.send(rings.to_vec()).expect("the test waits");
        }
        Ok(())
    }
}

/// A crate, and the relay's link to it.
struct Crate {
    spy: Arc<Spy>,
    look: EventFd,
    link: CrateLink,
    _ends: [UnixStream; 2],
    _daemon: VhostUserDaemon<Arc<Spy>>,
}

/// What the crate's state is, as far as a VMM has set it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    memory: Vec<(u64, u64)>,
    features: u64,
    rings: Vec<SeenRing>,
}

#[derive(Debug, PartialEq, Eq)]
struct SeenRing {
    size: u16,
    places: [u64; 3],
    next_avail: u16,
    is_ready: bool,
    is_enabled: bool,
    event_idx: bool,
    has: [bool; 2],
}

impl Crate {
    fn new() -> Self {
        let spy = Arc::new(Spy::default());
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon =
            VhostUserDaemon::new("crate".into(), spy.clone(), memory).expect("a daemon");
        let look = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).expect("an eventfd");
        for worker in daemon.get_epoll_handlers() {
            let event = (EventSet::IN | EventSet::EDGE_TRIGGERED, u64::from(LOOK));
            worker
                .register_listener(look.as_raw_fd(), event.0, event.1)
                .expect("added");
        }
        let (listener, socket) = private_connection().expect("a connection");
        daemon.start(&mut listener.into()).expect("started");
        let (vmm, vmm_end) = UnixStream::pair().expect("sockets");
        let (stop, stop_end) = UnixStream::pair().expect("sockets");
        Self {
            spy,
            look,
            link: CrateLink::new(socket, vmm, stop).expect("a link"),
            _ends: [vmm_end, stop_end],
            _daemon: daemon,
        }
    }

    fn see(&self) -> Seen {
        let (sender, seen) = mpsc::channel();
        *self.spy.rings.lock().expect("rings") = Some(sender);
        self.look.write(1).expect("written");
        let rings = seen.recv_timeout(HANG).expect("the worker answers");
        let rings = rings.iter().map(|ring| {
            let ring = ring.get_ref();
            let queue = ring.get_queue();
            SeenRing {
                size: queue.size(),
                places: [queue.desc_table(), queue.avail_ring(), queue.used_ring()],
                next_avail: queue.next_avail(),
                is_ready: queue.ready(),
                is_enabled: ring.is_enabled(),
                event_idx: queue.event_idx_enabled(),
                has: [ring.get_kick().is_some(), ring.get_call().is_some()],
            }
        });
        Seen {
            memory: self.spy.memory.lock().expect("memory").clone(),
            features: *self.spy.features.lock().expect("features"),
            rings: rings.collect(),
        }
    }

    fn tell(&mut self, message: &MessageBytes, files: &[BorrowedFd<'_>]) -> Verdict {
        self.link.exchange(message, files).expect("a link")
    }
}

/// The region with this number.
fn region(number: u64) -> [u64; 4] {
    // One address of the VMM is in two regions.
    [number * RAM, RAM, USER + number.min(2) * RAM, 0]
}

fn ring_place(index: u32, at: u64) -> Vec<u8> {
    let mut body = u64::from(index).to_ne_bytes().to_vec();
    for address in [USER + at, USER + at + 0x2000, USER + at + 0x1000, 0] {
        body.extend(address.to_ne_bytes());
    }
    body
}

fn message() -> impl Strategy<Value = Sent> {
    let ring = 0..2u32;
    let features = prop_oneof![
        Just(PROTOCOL | Device::offered_features()),
        Just(PROTOCOL | 1 << 32),
        Just(1 << 32),
    ];
    let get = prop::sample::select(vec![
        Req::GET_FEATURES,
        Req::GET_PROTOCOL_FEATURES,
        Req::GET_QUEUE_NUM,
        Req::RESET_DEVICE,
    ]);
    let owner = prop::sample::select(vec![Req::SET_OWNER, Req::RESET_OWNER]);
    let table = |count: u64| {
        let mut words = vec![count];
        (0..count).for_each(|number| words.extend(region(number)));
        let files: Vec<_> = (0..count).map(|_| memfd(RAM)).collect();
        let files: Vec<_> = files.iter().collect();
        Sent::words(Req::SET_MEM_TABLE, &words).with(&files)
    };
    let one = |request, number| {
        let words = [&[0], region(number).as_slice()].concat();
        Sent::words(request, &words).with(&[&memfd(RAM)])
    };
    let has_file = |request, index: u32, has: bool| {
        let number = u64::from(index) | u64::from(!has) << 8;
        let sent = Sent::words(request, &[number]);
        if has { sent.with(&[&event()]) } else { sent }
    };
    let sizes = prop::sample::select(vec![16, 256, 1024, 3]);
    prop_oneof![
        2 => get.prop_map(|request| Sent::new(request, &[])),
        1 => owner.prop_map(|request| Sent::new(request, &[])),
        2 => Just(Sent::words(Req::SET_PROTOCOL_FEATURES, &[0xa209])),
        4 => features.prop_map(|features| Sent::words(Req::SET_FEATURES, &[features])),
        3 => (1..4u64).prop_map(table),
        2 => (1..5u64).prop_map(move |number| one(Req::ADD_MEM_REG, number)),
        1 => (0..5u64).prop_map(move |number| one(Req::REM_MEM_REG, number)),
        3 => (ring.clone(), sizes).prop_map(|(i, size)| Sent::ring(Req::SET_VRING_NUM, i, size)),
        4 => (ring.clone(), 0..5u64).prop_map(|(index, number)| {
            Sent::new(Req::SET_VRING_ADDR, &ring_place(index, number * RAM / 2))
        }),
        2 => (ring.clone(), any::<u16>())
            .prop_map(|(index, base)| Sent::ring(Req::SET_VRING_BASE, index, base.into())),
        2 => ring.clone().prop_map(|index| Sent::ring(Req::GET_VRING_BASE, index, 0)),
        4 => (ring.clone(), prop::bool::weighted(0.8))
            .prop_map(move |(index, has)| has_file(Req::SET_VRING_KICK, index, has)),
        3 => (ring.clone(), prop::bool::weighted(0.8))
            .prop_map(move |(index, has)| has_file(Req::SET_VRING_CALL, index, has)),
        3 => (ring, 0..2u32).prop_map(|(i, on)| Sent::ring(Req::SET_VRING_ENABLE, i, on)),
    ]
}

/// The files that are kept, by name.
#[derive(Default)]
struct Kept {
    files: BTreeMap<String, Arc<OwnedFd>>,
    next: usize,
}

impl Kept {
    fn keep(&mut self, sent: &Sent) -> Vec<String> {
        let count = VmmState::keeps(&sent.bytes, sent.files.len());
        let kept = sent.files.iter().take(count).map(|file| {
            self.next += 1;
            let name = format!("file.{}", self.next);
            self.files.insert(name.clone(), file.clone());
            name
        });
        kept.collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]
    #[test]
    fn a_new_crate_is_told_all_that_the_old_one_knew(
        sent in prop::collection::vec(message(), 1..40),
    ) {
        let mut old = Crate::new();
        let mut state = VmmState::default();
        let mut kept = Kept::default();
        let mut seen = old.see();
        let negotiation = [
            Sent::words(Req::SET_PROTOCOL_FEATURES, &[0xa209]),
            Sent::words(Req::SET_FEATURES, &[PROTOCOL | 1 << 32]),
        ];
        for sent in negotiation.iter().chain(&sent) {
            let names = kept.keep(sent);
            let files: Vec<_> = sent.files.iter().map(AsFd::as_fd).collect();
            // The crate closes the connection.
            let Verdict::Accepted(reply) = old.tell(&sent.bytes, &files) else {
                kept.files.retain(|name, _| !names.contains(name));
                break;
            };
            for name in state.apply(&sent.bytes, names, reply.as_ref()) {
                prop_assert!(kept.files.remove(&name).is_some(), "{} is released twice", name);
            }
            seen = old.see();
        }
        // What is kept is what the state has, each once.
        let mut names = state.names();
        names.sort();
        let mut all: Vec<_> = kept.files.keys().collect();
        all.sort();
        prop_assert_eq!(names, all);
        prop_assert!(state.is_plausible());
        let bytes = serde_json::to_vec(&state).expect("JSON");
        let read: VmmState = serde_json::from_slice(&bytes).expect("JSON");
        prop_assert_eq!(&read, &state);

        let mut new = Crate::new();
        let bases = [state.rings[0].base, state.rings[1].base];
        let gone = state.forget_unreachable_rings();
        let Ok(after) = state.after_restore(bases) else {
            let started = state.rings.iter().filter(|ring| ring.is_started);
            let is_gone = |at| state.to_user(at).is_none();
            let mut places = started.filter_map(|ring| ring.place);
            // A started ring is where the guest has no memory any more.
            let any = places.any(|p| [p.descriptors, p.available, p.used].into_iter().any(is_gone));
            prop_assert!(any);
            return Ok(());
        };
        for Told { request, body, files } in state.before_restore().iter().chain(&after) {
            let spare = event();
            let file = |name: &String| {
                if name.is_empty() { spare.as_fd() } else { kept.files[name].as_fd() }
            };
            let files: Vec<_> = files.iter().map(file).collect();
            let verdict = new.tell(&MessageBytes::new(*request, body), &files);
            prop_assert!(matches!(verdict, Verdict::Accepted(_)), "{:?} is refused", request);
        }
        let mut now = new.see();
        for index in gone {
            prop_assert!(!state.rings[index].is_started);
            prop_assert_eq!(now.rings[index].places, [0; 3]);
            now.rings[index].places = seen.rings[index].places;
        }
        if state.dropped_by == Some(Dropper::Device) {
            // The VMM sets the features again before it can enable a ring.
            for (now, before) in now.rings.iter_mut().zip(&seen.rings) {
                now.event_idx = before.event_idx;
            }
        }
        prop_assert_eq!(now, seen);
    }
}
