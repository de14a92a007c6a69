//! Any messages of a vfio-user client to the virtio-pci device, most of them accesses to its registers.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vhost_device_iommu::config::Config;
use vhost_device_iommu::daemon::Daemon;
use vhost_device_iommu::process::keeper::Keeper;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const PATIENCE: Duration = Duration::from_secs(20);
const RAM: u64 = 1 << 20;

#[derive(Arbitrary, Debug)]
enum Piece {
    /// A write to BAR 0: a structure, an offset in it, and the bytes.
    Register(u8, u8, Vec<u8>),
    Space(u8, Vec<u8>),
    Read(u8, u16, u8),
    /// RAM at this page.
    Map(u8),
    Unmap(u8),
    Reset,
    Irqs(u8, u8, u8, u8),
    Message(u8, Vec<u8>),
}

fn connect() -> UnixStream {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    let socket = SOCKET.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("viommu-fuzz-pci-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let socket = folder.join("vmm");
        let text = format!(
            "vfio-user-socket = {:?}\naddress = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\n",
            socket.display().to_string()
        );
        let config = Config::from_text(&folder.join("vm.toml"), &text).expect("a configuration");
        let mut daemon = Daemon::new(&config, Arc::new(Keeper::none())).expect("a daemon");
        std::thread::spawn(move || daemon.run().expect("it runs"));
        socket
    });
    let stream = UnixStream::connect(socket).expect("the daemon listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream.set_write_timeout(Some(PATIENCE)).expect("set");
    stream
}

fn message(command: u16, body: &[u8]) -> Vec<u8> {
    // No reply, so that the daemon never waits for this end.
    let mut bytes = Vec::new();
    bytes.extend(1u16.to_ne_bytes());
    bytes.extend(command.to_ne_bytes());
    bytes.extend((16 + body.len() as u32).to_ne_bytes());
    bytes.extend(0x10u32.to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend(body);
    bytes
}

fn access(region: u32, at: u64, count: usize, data: &[u8]) -> Vec<u8> {
    let head = [region.to_ne_bytes(), (count as u32).to_ne_bytes()].concat();
    [&at.to_ne_bytes()[..], &head, data].concat()
}

fn window(words: &[u32], quads: &[u64]) -> Vec<u8> {
    let words = words.iter().flat_map(|word| word.to_ne_bytes());
    words
        .chain(quads.iter().flat_map(|quad| quad.to_ne_bytes()))
        .collect()
}

fuzz_target!(|pieces: Vec<Piece>| {
    let mut stream = connect();
    let hello = message(1, &[&[0; 4][..], b"{}\0"].concat());
    stream.write_all(&hello).expect("sent");
    for piece in pieces.into_iter().take(256) {
        let mut file: Option<OwnedFd> = None;
        let bytes = match piece {
            Piece::Register(structure, at, data) => {
                let at = u64::from(structure % 6) << 12 | u64::from(at);
                message(10, &access(0, at, data.len(), &data))
            }
            Piece::Space(at, data) => message(10, &access(7, at.into(), data.len(), &data)),
            Piece::Read(region, at, count) => {
                message(9, &access(region.into(), at.into(), count.into(), &[]))
            }
            Piece::Map(page) => {
                let ram = std::env::temp_dir().join(format!("viommu-ram-{}", std::process::id()));
                let mut options = std::fs::File::options();
                let options = options.read(true).write(true).create(true).truncate(true);
                let made = options.open(&ram).expect("a file");
                std::fs::remove_file(&ram).expect("removed");
                made.set_len(RAM).expect("room");
                file = Some(made.into());
                message(2, &window(&[32, 3], &[0, u64::from(page) << 16, RAM]))
            }
            Piece::Unmap(page) => message(3, &window(&[24, 0], &[u64::from(page) << 16, RAM])),
            Piece::Reset => message(13, &[]),
            Piece::Irqs(flags, index, start, count) => message(
                8,
                &window(
                    &[20, flags.into(), index.into(), start.into(), count.into()],
                    &[],
                ),
            ),
            Piece::Message(command, body) => message((command % 20).into(), &body),
        };
        let raw: Vec<RawFd> = file.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = if raw.is_empty() {
            stream.write_all(&bytes).is_ok()
        } else {
            stream.send_with_fds(&[&bytes[..]], &raw).is_ok()
        };
        if !sent {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
    if let Err(cause) = stream.read_to_end(&mut Vec::new()) {
        let kind = cause.kind();
        assert_eq!(
            kind,
            std::io::ErrorKind::ConnectionReset,
            "the daemon hangs"
        );
    }
});
