//! Any bytes over vfio-user, split at any offset.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use vhost_device_iommu::vfio_user::message::{Command, check_command, check_reply};
use vhost_device_iommu::vfio_user::socket::{Received, Receiver};
use vhost_device_iommu::vfio_user::version::Version;

fuzz_target!(|input: (u8, Vec<u8>)| {
    let (cut, bytes) = input;
    let (mut here, there) = UnixStream::pair().expect("sockets");
    let mut receiver = Receiver::default();
    let mut rest = bytes.get(..bytes.len().min(64 << 10)).unwrap_or_default();
    loop {
        let (now, later) = rest.split_at(rest.len().min(usize::from(cut) + 1));
        here.write_all(now).expect("room");
        rest = later;
        loop {
            match receiver.receive(&there) {
                Ok(Received::Message(message)) => {
                    assert_eq!(message.header.body_len, message.body.len());
                    let Some(command) = Command::from_number(message.header.command) else {
                        continue;
                    };
                    let _ = check_command(command, &message.body, 0);
                    let _ = check_reply(command, &message.body, 0);
                    if let Ok(version) = Version::decode(&message.body) {
                        let _ = version.proposal();
                        let _ = Version::default().answer(&version, 0);
                    }
                }
                Ok(Received::Nothing) => break,
                Ok(Received::End) | Err(_) => return,
            }
        }
        if rest.is_empty() {
            return;
        }
    }
});
