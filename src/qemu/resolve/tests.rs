use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const FILE: &str = "# A VM.\naddress = '00:05.0'\nqmp = 'QMP'\n\n\
    [[port]]\naddress = '00:02.0/00.0'\nkind = 'pcie-pci-bridge'\n\n[[endpoint]]\ndevice = 'nic' # the card\nvfio = '65:00.0'\n\n\
    # The disk.\n[[endpoint]]\ndevice = 'disk'\ngroup = 'g'\n# The end.\n";

/// A folder with a file for a VM, and a peer in the place of QEMU.
struct Bed {
    folder: TempDir,
    file: PathBuf,
}

impl Bed {
    /// `QMP` in the text stands for the peer's socket.
    fn new(text: &str, peer: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("qmp");
        let listener = UnixListener::bind(&socket).expect("a socket");
        std::thread::spawn(move || peer(listener.accept().expect("connected").0));
        let file = folder.path().join("vm.toml");
        let bed = Self { folder, file };
        bed.write(&text.replace("QMP", &socket.display().to_string()));
        bed
    }

    fn write(&self, text: &str) {
        fs::write(&self.file, text).expect("written");
    }

    fn resolve(&self) -> Result<Resolution, ResolveError> {
        Resolution::new(&self.file, None)
    }

    fn refusal(&self) -> String {
        self.resolve().expect_err("refused").to_string()
    }
}

/// Answers as QEMU does for these objects: path, address and bus. An address of -1 stands for an object that has none.
fn qemu(objects: &[(&str, i64, &str)]) -> impl FnOnce(UnixStream) + Send + 'static {
    let objects: HashMap<String, (i64, String)> = objects
        .iter()
        .map(|(path, address, bus)| ((*path).to_owned(), (*address, (*bus).to_owned())))
        .collect();
    move |mut stream| {
        let reader = BufReader::new(stream.try_clone().expect("a descriptor"));
        let mut send = |message: &Value| writeln!(stream, "{message}\r").expect("taken");
        send(&json!({ "QMP": { "version": {}, "capabilities": ["oob"] } }));
        for line in reader.lines().map_while(Result::ok) {
            let command: Value = serde_json::from_str(&line).expect("JSON");
            send(&json!({ "event": "STOP", "data": {} }));
            let id = &command["id"];
            let error =
                |class: &str| json!({ "id": id, "error": { "class": class, "desc": "no\n" } });
            let object = command["arguments"]["path"]
                .as_str()
                .map(|path| objects.get(path));
            send(&match (object, command["arguments"]["property"].as_str()) {
                (None, _) => json!({ "id": id, "return": {} }),
                (Some(None), _) => error("DeviceNotFound"),
                (Some(Some((-1, _))), Some("addr")) => error("GenericError"),
                (Some(Some((address, _))), Some("addr")) => json!({ "id": id, "return": address }),
                (Some(Some((_, bus))), _) => json!({ "id": id, "return": bus }),
            });
        }
    }
}

const HOST_BRIDGE: (&str, i64, &str) = ("/machine/q35", -1, "/machine/unattached/sysbus");
const NIC: (&str, i64, &str) = ("/machine/peripheral/nic", 0x31, "/machine/q35/pcie.0");

#[test]
fn addresses_come_into_the_file_beside_its_comments() {
    let bed = Bed::new(
        FILE,
        qemu(&[
            HOST_BRIDGE,
            NIC,
            ("/machine/peripheral/disk", 0x08, "/machine/peripheral/b/b"),
            (
                "/machine/peripheral/b",
                0,
                "/machine/peripheral-anon/device[3]/p",
            ),
            (
                "/machine/peripheral-anon/device[3]",
                0x10,
                "/machine/q35/pcie.0",
            ),
        ]),
    );
    let before = fs::read_to_string(&bed.file).expect("the file");
    let made = bed.resolve().expect("found");
    let printed: String = made.found.iter().map(ToString::to_string).collect();
    assert_eq!(
        printed,
        "# endpoint[0], device = \"nic\":\naddress = \"00:06.1\"\n\
         # endpoint[1], device = \"disk\":\nport = \"00:02.0/00.0\"\naddress = \"01.0\"\n"
    );
    let expected = before
        .replace("65:00.0'\n", "65:00.0'\naddress = \"00:06.1\"\n")
        .replace(
            "'g'\n",
            "'g'\nport = \"00:02.0/00.0\"\naddress = \"01.0\"\n",
        );
    assert_eq!(made.text, expected);
    // Only `replace` changes the file.
    assert_eq!(fs::read_to_string(&bed.file).expect("the file"), before);
    bed.write(&made.text);
    assert_eq!(bed.resolve().expect("whole").found, []);
}

#[test]
fn a_list_of_endpoints_in_one_line_is_changed_in_its_place() {
    let text = "address = '00:05.0'\nqmp = 'QMP'\n\
        endpoint = [{ address = '00:07.0' }, { device = 'nic' }] # all\nname = 'x'\n";
    let bed = Bed::new(text, qemu(&[HOST_BRIDGE, NIC]));
    let made = bed.resolve().expect("found");
    let line =
        "endpoint = [{ address = '00:07.0' }, { device = 'nic' , address = \"00:06.1\" }] # all";
    assert!(made.text.lines().any(|it| it == line), "{}", made.text);
    assert_eq!(made.found.first().map(|it| it.endpoint), Some(1));
}

/// The file is replaced at once, keeps its mode, and a link to it stays a link.
#[test]
fn a_file_is_replaced_with_its_mode() {
    let bed = Bed::new(FILE, drop);
    fs::set_permissions(&bed.file, fs::Permissions::from_mode(0o640)).expect("changed");
    let link = bed.folder.path().join("link.toml");
    symlink("vm.toml", &link).expect("a link");
    let before = fs::metadata(&bed.file).expect("the file");
    replace(&link, "new").expect("replaced");
    let after = fs::metadata(&bed.file).expect("the file");
    assert_eq!(fs::read_to_string(&bed.file).expect("the file"), "new");
    assert_eq!((after.mode(), after.uid()), (before.mode(), before.uid()));
    assert_ne!(after.ino(), before.ino(), "written in place");
    assert!(link.is_symlink());
    let left: Vec<_> = fs::read_dir(bed.folder.path()).expect("a folder").collect();
    assert_eq!(left.len(), 3, "the file, the link and the socket");
}

#[test]
fn places_that_are_none_of_an_endpoint_are_refused() {
    let other_root = [
        ("/machine/peripheral/nic", 0, "/machine/peripheral/x/x"),
        ("/machine/peripheral/x", -1, "/machine/unattached/sysbus"),
    ];
    let on_the_iommu = [
        HOST_BRIDGE,
        ("/machine/peripheral/nic", 0x28, "/machine/q35/pcie.0"),
        ("/machine/peripheral/disk", 0x30, "/machine/q35/pcie.0"),
    ];
    let endless = [("/machine/peripheral/nic", 0, "/machine/peripheral/nic/x")];
    let no_number = [("/machine/peripheral/nic", 256, "/machine/q35/pcie.0")];
    let no_bus = [("/machine/peripheral/nic", 0, "nonsense")];
    let not_pci = [("/machine/peripheral/nic", -1, "/machine/q35/pcie.0")];
    let cases: [(&[_], &str); 7] = [
        (&[HOST_BRIDGE], "start it with `-device ...,id=nic`"),
        (&not_pci, "is no PCI device (no )"),
        (&other_root, "give it another `bus`"),
        (&on_the_iommu, "the file cannot be used"),
        (&endless, "none that QEMU gives"),
        (&no_number, "none that QEMU gives"),
        (&no_bus, "none that QEMU gives"),
    ];
    for (objects, message) in cases {
        let refusal = Bed::new(FILE, qemu(objects)).refusal();
        assert!(refusal.contains(message), "{message}: {refusal}");
    }
    // An ID is no path.
    let text = FILE.replace("'nic'", "'../nic'");
    let refusal = Bed::new(&text, qemu(&[HOST_BRIDGE, NIC])).refusal();
    assert!(refusal.contains("no device with the ID"), "{refusal}");
}

#[test]
fn files_and_peers_that_are_none_are_refused() {
    let bed = Bed::new(FILE, drop);
    for (text, message) in [
        ("address = ", "vm.toml:1"),
        ("nonsense = 1\n", "unknown key"),
        (
            "address = '00:05.0'\n[[endpoint]]\ndevice = 'x'\n",
            "give --qmp",
        ),
        (
            "address = '00:05.0'\nqmp = '/nowhere'\n[[endpoint]]\ndevice = 'x'\n",
            "/nowhere",
        ),
    ] {
        bed.write(text);
        let refusal = bed.refusal();
        assert!(refusal.contains(message), "{message}: {refusal}");
    }
    for greeting in [
        "",
        "{}\n",
        "hello\n",
        "{\"QMP\": {}}\n{\"id\": 1, \"error\": {}}\n",
    ] {
        let bed = Bed::new(FILE, move |mut stream| {
            stream.write_all(greeting.as_bytes()).expect("taken");
        });
        let refusal = bed.refusal();
        assert!(refusal.contains("start QEMU with"), "{refusal}");
    }
}

/// A peer that says nothing, or too much, holds nobody up for longer than the deadline.
#[test]
fn a_peer_that_does_not_answer_is_given_up() {
    let bed = Bed::new(FILE, drop);
    let socket = bed.folder.path().join("silent");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let limit = Duration::from_millis(200);
    let silent = MonitorClient::connect(&socket, Instant::now() + limit);
    assert!(silent.is_err_and(|cause| cause.to_string().contains("in time")));
    std::thread::spawn(move || {
        // The connection above.
        drop(listener.accept());
        let (mut stream, _) = listener.accept().expect("connected");
        let mut lines = "{\"QMP\": {}}\n".to_owned();
        while stream.write_all(lines.as_bytes()).is_ok() {
            "{\"event\": \"x\"}\n".clone_into(&mut lines);
        }
    });
    let chatty = MonitorClient::connect(&socket, Instant::now() + limit);
    assert!(chatty.is_err_and(|cause| cause.to_string().contains("in time")));
}
