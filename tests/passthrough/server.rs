//! A device's vfio-user server that runs in a thread. It keeps its windows, and does DMA when the test asks.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use crate::connection::{
    Connection, DMA_MAP, DMA_READ, DMA_UNMAP, DMA_WRITE, ERROR, Msg, NO_REPLY, REPLY, VERSION, dma,
    version_body,
};

const TEXT: &str = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}"#;

/// A window of the server. `file` is the file and offset of its memory, if it came with a descriptor.
struct Window {
    first: u64,
    len: u64,
    file: Option<(File, u64)>,
}

/// The server's thread and its connection.
pub struct Server {
    windows: Arc<Mutex<Vec<Window>>>,
    refuses: Arc<AtomicBool>,
    replies: Receiver<Msg>,
    commands: Connection,
}

impl Server {
    /// Listens at `path`, calls `begin`, and serves one connection.
    pub fn start(path: &Path, begin: impl FnOnce()) -> Self {
        let listener = UnixListener::bind(path).expect("a socket");
        begin();
        let (stream, _) = listener.accept().expect("a connection");
        let windows = Arc::new(Mutex::new(Vec::new()));
        let refuses = Arc::new(AtomicBool::new(false));
        let (sender, replies) = channel();
        let commands = Connection::new(stream.try_clone().expect("a descriptor"));
        let mut connection = Connection::new(stream);
        // The thread waits for messages without a limit.
        connection.stream.set_read_timeout(None).expect("set");
        let (shared_windows, shared_refuses) = (windows.clone(), refuses.clone());
        std::thread::spawn(move || {
            while let Some(msg) = connection.recv() {
                if msg.flags == REPLY || msg.flags == ERROR {
                    let _ = sender.send(msg);
                } else {
                    answer(&mut connection, msg, &shared_windows, &shared_refuses);
                }
            }
        });
        Self {
            windows,
            refuses,
            replies,
            commands,
        }
    }

    /// First addresses of the present windows, in order.
    pub fn windows(&self) -> Vec<u64> {
        let mut all: Vec<_> = self
            .windows
            .lock()
            .unwrap()
            .iter()
            .map(|w| w.first)
            .collect();
        all.sort_unstable();
        all
    }

    /// Sets whether the server refuses DMA_MAP.
    pub fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }

    /// Reads memory as the device does: from the window's file, or by a message if it has none.
    pub fn read(&mut self, iova: u64, len: usize) -> Result<Vec<u8>, i32> {
        let mut data = vec![0; len];
        if let Some(done) =
            self.access_file(iova, len, |file, at| file.read_exact_at(&mut data, at))
        {
            done.expect("guest RAM");
            return Ok(data);
        }
        let reply = self.ask(DMA_READ, &dma(iova, len as u64, &[]));
        match reply.errno() {
            0 => Ok(reply.body[16..].to_vec()),
            errno => Err(errno),
        }
    }

    /// Writes memory as the device does: to the window's file, or by a message if it has none.
    pub fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), i32> {
        if let Some(done) =
            self.access_file(iova, data.len(), |file, at| file.write_all_at(data, at))
        {
            done.expect("guest RAM");
            return Ok(());
        }
        match self
            .ask(DMA_WRITE, &dma(iova, data.len() as u64, data))
            .errno()
        {
            0 => Ok(()),
            errno => Err(errno),
        }
    }

    /// Calls `act` with the file and the offset of `iova`, if a window with a file has all of the range.
    fn access_file(
        &self,
        iova: u64,
        len: usize,
        act: impl FnOnce(&File, u64) -> io::Result<()>,
    ) -> Option<io::Result<()>> {
        let windows = self.windows.lock().unwrap();
        let inside = |w: &&Window| iova >= w.first && iova + len as u64 <= w.first + w.len;
        let window = windows.iter().find(inside)?;
        let (file, offset) = window.file.as_ref()?;
        Some(act(file, offset + (iova - window.first)))
    }

    fn ask(&mut self, command: u16, body: &[u8]) -> Msg {
        let id = self.commands.ask(command, body, &[]);
        let reply = self.replies.recv().expect("connected");
        assert_eq!(reply.id, id);
        reply
    }
}

fn answer(
    connection: &mut Connection,
    mut msg: Msg,
    windows: &Mutex<Vec<Window>>,
    refuses: &AtomicBool,
) {
    match msg.cmd {
        VERSION => connection.reply(&msg, &version_body(TEXT), &[]),
        DMA_MAP if refuses.load(Ordering::SeqCst) => {
            connection.refuse(&msg, libc::ENOSPC.unsigned_abs());
        }
        DMA_MAP => {
            let offset = msg.u64_at(8);
            let file = msg.fds.pop().map(|fd: OwnedFd| (File::from(fd), offset));
            windows.lock().unwrap().push(Window {
                first: msg.u64_at(16),
                len: msg.u64_at(24),
                file,
            });
            connection.reply(&msg, &[], &[]);
        }
        DMA_UNMAP => {
            let first = msg.u64_at(8);
            windows.lock().unwrap().retain(|w| w.first != first);
            connection.reply(&msg, &msg.body, &[]);
        }
        _ if msg.flags & NO_REPLY != 0 => {}
        _ => connection.refuse(&msg, libc::ENOTSUP.unsigned_abs()),
    }
}
