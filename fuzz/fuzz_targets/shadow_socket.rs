//! Any bytes on a shadow socket: frames of a process that registers as a reader, or does not.
#![no_main]

mod common;

use std::io::Write;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vhost_device_iommu::shadow::wire::{FRAME_LEN, Frame, MAGIC, VERSION, kind};

#[derive(Arbitrary, Debug)]
enum Piece {
    Hello(u16),
    Frame(u8, u32, [u64; 4]),
    Bytes(Vec<u8>),
}

fuzz_target!(|pieces: Vec<Piece>| {
    let mut stream = common::connect("shadow");
    for piece in pieces {
        let bytes = match piece {
            Piece::Hello(endpoint) => {
                // Endpoint 0x38 is the one that the socket serves.
                let endpoint = if endpoint < 0x8000 {
                    0x38
                } else {
                    u64::from(endpoint)
                };
                let hello = Frame::new(kind::HELLO, VERSION, [MAGIC, endpoint, 0, 0]);
                hello.to_wire().to_vec()
            }
            Piece::Frame(kind, value, numbers) => Frame::new(u32::from(kind % 12), value, numbers)
                .to_wire()
                .to_vec(),
            Piece::Bytes(bytes) => bytes,
        };
        // The daemon closes the connection at the first wrong frame.
        if stream.write_all(&bytes).is_err() {
            break;
        }
    }
    let answer = common::finish(stream);
    assert!(answer.len() % FRAME_LEN == 0, "{} bytes", answer.len());
});
