//! A daemon with everything that an operator can query.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::shadow::ShadowReader;
use vm_memory::{Bytes, GuestAddress};

use crate::common::daemon::{Daemon, EP, connect};
use std::io::{Read, Write};
use std::time::Duration;

/// A daemon with readers for its first endpoint; the sockets are in a folder.
pub struct Bed {
    pub daemon: Daemon,
    pub folder: TempDir,
}

impl Bed {
    /// Starts a daemon with these keys at the top of the configuration and these tables at its end.
    /// FOLDER stands for the path of the folder.
    pub fn new(keys: &str, tables: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().to_str().expect("UTF-8");
        let text = format!(
            "name = 'web-1'\naddress = '00:05.0'\nbypass = false\n{keys}\n\
             [[endpoint]]\naddress = '00:06.0'\nshadow = 'FOLDER/disk.sock'\n\
             [[endpoint]]\nrange = '00:07.0-00:08.7'\n{tables}\n"
        );
        let daemon = Daemon::with_config(&text.replace("FOLDER", path));
        Self { daemon, folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Connects a reader for the first endpoint.
    pub fn reader(&self) -> ShadowReader {
        let path = self.path("disk.sock");
        ShadowReader::connect(&path, EndpointId(EP)).expect("accepted")
    }

    /// Runs `ctl` with these arguments.
    pub fn ctl(&self, args: &[&str]) -> Output {
        ctl(&self.daemon.control_socket(), args)
            .output()
            .expect("it runs")
    }

    /// Standard output of `ctl`, which must succeed.
    pub fn text(&self, args: &[&str]) -> String {
        let output = self.ctl(args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {errors}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// The JSON document that `ctl` prints.
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.text(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e} in {text}"))
    }

    /// The limit of this key: its value, its use, the number of hits.
    pub fn limit(&self, key: &str) -> (u64, Option<u64>, u64) {
        let stats = self.daemon.control("stats");
        let limits = stats["limits"].as_array().expect("limits");
        let limit = limits.iter().find(|limit| limit["key"] == key);
        let limit = limit.unwrap_or_else(|| panic!("{key} in {stats}"));
        let number = |field: &str| limit[field].as_u64().expect("a number");
        (number("value"), limit["used"].as_u64(), number("hits"))
    }
}

/// `ctl` with this control socket.
pub fn ctl(socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"));
    command.arg("ctl").arg(socket).args(args);
    command
}

/// Makes an access that is refused.
pub fn make_refused_access(reader: &ShadowReader, iova: u64) {
    let memory = reader.memory();
    let read = memory.read_obj::<u8>(GuestAddress(iova));
    read.expect_err("not mapped");
}

/// Sends these bytes and returns the answer, up to the end of the stream.
pub fn exchange(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = connect(socket);
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).expect("time limit");
    // The daemon may close the connection before it has read all bytes.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).expect("UTF-8")
}

/// The sample of this name with exactly these labels, besides the VM's.
pub fn sample(page: &str, name: &str, labels: &str) -> Option<f64> {
    let begin = format!("vhost_device_iommu_{name}{{vm=\"web-1\"{labels}}} ");
    let line = page.lines().find_map(|line| line.strip_prefix(&begin))?;
    Some(line.parse().expect("a number"))
}
