//! A daemon in this process, which lives as long as the fuzzer. Its threads are the real ones, so a panic in any of them
//! ends the fuzzer, and their coverage guides it.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use vhost_device_iommu::config::Config;
use vhost_device_iommu::daemon::Daemon;
use vhost_device_iommu::process::keeper::Keeper;

/// Longer than the daemon takes to close a connection whose other end is shut down.
const PATIENCE: Duration = Duration::from_secs(20);

/// The folder with the daemon's sockets. Starts the daemon at the first call.
pub fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("viommu-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let at = |name: &str| folder.join(name).display().to_string();
        let text = format!(
            "socket = {:?}\ncontrol = {:?}\naddress = '00:05.0'\nhotplug = ['00:08.0-00:08.7']\n\
             [[endpoint]]\naddress = '00:06.0'\n\
             [[endpoint]]\naddress = '00:07.0'\nshadow = {:?}\n\
             [metrics]\nsocket = {:?}\n",
            at("vhost"),
            at("control"),
            at("shadow"),
            at("metrics")
        );
        let config = Config::from_text(&folder.join("vm.toml"), &text).expect("a configuration");
        let mut daemon = Daemon::new(&config, Arc::new(Keeper::none())).expect("a daemon");
        std::thread::spawn(move || daemon.run().expect("it runs"));
        folder
    })
}

/// A connection to the daemon's socket of this name.
pub fn connect(name: &str) -> UnixStream {
    let stream = UnixStream::connect(folder().join(name)).expect("the daemon listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream.set_write_timeout(Some(PATIENCE)).expect("set");
    stream
}

/// Ends the fuzzer's side of the connection. Returns what the daemon has sent until it closed its own.
pub fn finish(mut stream: UnixStream) -> Vec<u8> {
    // The daemon may have closed the connection.
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(cause) = stream.read_to_end(&mut answer) {
        let kind = cause.kind();
        assert_eq!(
            kind,
            std::io::ErrorKind::ConnectionReset,
            "the daemon hangs"
        );
    }
    answer
}
