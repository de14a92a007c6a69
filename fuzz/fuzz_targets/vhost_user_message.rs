//! Any messages of a VMM at the vhost-user socket, with descriptors of any kind.
#![no_main]

mod common;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

#[derive(Arbitrary, Debug)]
enum Descriptor {
    Event,
    Memory,
    Null,
    Pipe,
}

#[derive(Arbitrary, Debug)]
enum Piece {
    /// A message with the length of its body.
    Message(u8, Vec<u8>, Vec<Descriptor>),
    /// GET_FEATURES, SET_OWNER, and SET_FEATURES or SET_PROTOCOL_FEATURES with this value.
    Start(bool, u64),
    /// A memory slot of a few pages: SET_MEM_TABLE or ADD_MEM_REG.
    Slot(bool, u8),
    /// Number, base or address of a ring.
    Ring(u8, bool, u32),
    /// Kick, call or error event of a ring.
    RingEvent(u8, u8, Descriptor),
    Bytes(Vec<u8>),
}

const SLOT: u64 = 16 << 12;

fn open(descriptor: &Descriptor) -> OwnedFd {
    match descriptor {
        Descriptor::Event => {
            let file: File = {
                let event = EventFd::new(EFD_NONBLOCK).expect("an event");
                use std::os::fd::{FromRawFd, IntoRawFd};
                // SAFETY: `into_raw_fd` has just given up ownership of the descriptor.
                unsafe { File::from_raw_fd(event.into_raw_fd()) }
            };
            file.into()
        }
        Descriptor::Memory => {
            let file = tempfile();
            file.set_len(SLOT).expect("room");
            file.into()
        }
        Descriptor::Null => File::open("/dev/null").expect("open").into(),
        Descriptor::Pipe => std::io::pipe().expect("a pipe").0.into(),
    }
}

fn tempfile() -> File {
    let path = std::env::temp_dir().join(format!("viommu-fuzz-ram-{}", std::process::id()));
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(false);
    let file = file.open(&path).expect("a file");
    std::fs::remove_file(&path).expect("removed");
    file
}

fn message(request: u32, body: &[u8]) -> Vec<u8> {
    let head = [request, 1, body.len() as u32];
    let mut bytes: Vec<u8> = head.into_iter().flat_map(u32::to_ne_bytes).collect();
    bytes.extend(body);
    bytes
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fuzz_target!(|pieces: Vec<Piece>| {
    let mut stream = common::connect("vhost");
    for piece in pieces.into_iter().take(64) {
        let (bytes, descriptors) = match piece {
            Piece::Message(request, body, descriptors) => {
                (message(u32::from(request % 48), &body), descriptors)
            }
            Piece::Start(protocol, value) => {
                let mut bytes = message(1, &[]);
                bytes.extend(message(3, &[]));
                bytes.extend(message(if protocol { 16 } else { 2 }, &words(&[value])));
                (bytes, Vec::new())
            }
            Piece::Slot(whole_table, at) => {
                // Guest-physical address, length, address of the VMM, offset.
                let gpa = u64::from(at) << 16;
                let slot = words(&[gpa, SLOT, 0x7000_0000_0000 + gpa, 0]);
                let head = words(&[u64::from(whole_table)]);
                let request = if whole_table { 5 } else { 37 };
                let bytes = message(request, &[head, slot].concat());
                (bytes, vec![Descriptor::Memory])
            }
            Piece::Ring(what, index, value) => {
                let index = u32::from(index);
                let body: Vec<u8> = match what % 4 {
                    0 | 1 => [index, value]
                        .into_iter()
                        .flat_map(u32::to_ne_bytes)
                        .collect(),
                    2 => [index, 1].into_iter().flat_map(u32::to_ne_bytes).collect(),
                    _ => {
                        let head = words(&[u64::from(index)]);
                        let at = 0x7000_0000_0000 + u64::from(value);
                        [head, words(&[at, at + 0x2000, at + 0x1000, 0])].concat()
                    }
                };
                // SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE, SET_VRING_ADDR.
                let request = [8, 10, 18, 9][usize::from(what % 4)];
                (message(request, &body), Vec::new())
            }
            Piece::RingEvent(what, index, descriptor) => {
                let request = 12 + u32::from(what % 3);
                (
                    message(request, &words(&[u64::from(index)])),
                    vec![descriptor],
                )
            }
            Piece::Bytes(bytes) => (bytes, Vec::new()),
        };
        if bytes.is_empty() {
            continue;
        }
        let fds: Vec<OwnedFd> = descriptors.iter().take(33).map(open).collect();
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        // The daemon closes the connection at the first wrong message.
        let sent = if raw.is_empty() {
            stream.write_all(&bytes).is_ok()
        } else {
            stream.send_with_fds(&[&bytes[..]], &raw).is_ok()
        };
        if !sent {
            break;
        }
    }
    common::finish(stream);
});
