//! Intel's 82576, a network card with its stock driver in a stock guest, each way to give it to the guest. What the guest
//! sees of an exported card is compared with what it sees of one that QEMU's own `vfio-pci` drives.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::client::{BAR, COMMAND, CONFIG, Client, MEMORY};
use crate::common::daemon::Daemon;
use crate::common::kept::Keeper;
use crate::connection::{IRQ_INFO, REGION_READ, RESET, SET_IRQS, irqs, region};
use crate::edu_driver::MASTER;
use crate::export::is_raised;
use crate::nested::{EDU as CARD, Nested, with_a_working_guest};
use crate::qtest::Qtest;
use crate::vm::Setup;
use crate::words;

/// The region of the expansion ROM, its size, and its first bytes.
const ROM: u32 = 6;
const ROM_SIZE: u32 = 256 << 10;
const ROM_SIGNATURE: u32 = 0xaa55;
/// Vendor and device.
const IDENTITY: u32 = 0x10c9_8086;
/// The register with the card's power state, in its first capability.
const POWER_STATE: u64 = 0x44;
/// The index of MSI-X interrupts, and flags of SET_IRQS.
const MSIX: u32 = 2;
const DATA_NONE: u32 = 1;
const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_TRIGGER: u32 = 1 << 5;
/// The card's vectors, and its registers that raise them (82576 datasheet, section 8.8).
const VECTORS: u32 = 10;
const STATUS: u64 = 8;
const GPIE: u64 = 0x1514;
const GPIE_MULTIPLE: u32 = 1 << 4;
const EICS: u64 = 0x1520;
const EIMS: u64 = 0x1524;
/// Time limit of a command that moves packets.
const TRAFFIC: Duration = Duration::from_secs(180);
/// Bytes that the guest sends and gets back.
const ECHOED: usize = 64 << 10;

/// A way to give the card to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// QEMU's `vfio-pci` binds it to the daemon's iommufd.
    Shared,
    /// The daemon exports it, with this interface to the host's IOMMU.
    Exported(&'static str),
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Exported(host_iommu) => host_iommu,
        }
    }

    fn launch(self, setup: &Setup) -> Nested {
        let card = &words("VIOMMU_IGB")[0];
        let (keys, export) = match self {
            Self::Shared => (String::new(), ""),
            Self::Exported(host_iommu) => (
                format!("host-iommu = \"{host_iommu}\""),
                "export = \"@/igb.sock\"\n",
            ),
        };
        let endpoint = format!("vfio = \"{card}\"\n{export}");
        Nested::launch(setup, &format!("igb-{}", self.name()), &keys, &endpoint)
    }
}

/// What a guest sees of the card without a driver.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    config: Vec<u8>,
    /// First and last address and flags of each region, as the guest has placed it.
    regions: Vec<String>,
    /// The ways in which the guest's kernel can reset it.
    resets: Vec<String>,
}

fn file(name: &str) -> String {
    format!("/sys/bus/pci/devices/{CARD}/{name}")
}

/// The bytes of `hexdump -C`, which prints `*` in place of equal lines.
fn bytes_of(dump: &[String]) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    for line in dump.iter().filter(|line| line.as_str() != "*") {
        let (at, rest) = line.split_once(' ').unwrap_or((line, ""));
        let at = usize::from_str_radix(at, 16).expect("an offset");
        let last: Vec<u8> = bytes.iter().rev().take(16).rev().copied().collect();
        while bytes.len() < at {
            bytes.extend(&last);
        }
        let digits = rest.split('|').next().unwrap_or_default();
        let row = digits.split_whitespace();
        bytes.extend(row.map(|byte| u8::from_str_radix(byte, 16).expect("a byte")));
    }
    bytes
}

fn look(nested: &mut Nested) -> Seen {
    let mut run = |command: String| nested.vm.run_within(&command, TRAFFIC);
    Seen {
        config: bytes_of(&run(format!("hexdump -C {}", file("config")))),
        regions: run(format!("cat {}", file("resource"))),
        resets: run(format!("cat {}", file("reset_method"))),
    }
}

/// Loads the driver, and lets it send and receive.
fn exchange_packets(nested: &mut Nested) {
    let steps = format!(
        "for module in $(grep -v igbvf /lib/modules/cards/load-order); do
             insmod /lib/modules/cards/$module 2>&1 | grep -v 'File exists'
         done
         card=$(ls {net}) && ifconfig $card 10.0.2.15 netmask 255.255.255.0 up || exit 1",
        net = file("net")
    );
    let one_line = steps.replace('\n', ";").replace("do;", "do ");
    nested
        .vm
        .run_within(&one_line.replace("exit 1", "false"), TRAFFIC);
    nested.vm.run_within(
        "n=0; until [ \"$(cat /sys/class/net/$card/carrier)\" = 1 ] || [ $n = 60 ]; do n=$((n + 1)); sleep 1; done; [ $n != 60 ]",
        TRAFFIC,
    );
    nested.vm.run_within("ping -c 3 -W 20 10.0.2.2", TRAFFIC);
    nested.vm.run_within(
        &format!("head -c {ECHOED} /dev/urandom >/run/sent; timeout 120 nc 10.0.2.100 7 </run/sent >/run/got; cmp /run/sent /run/got"),
        TRAFFIC,
    );
    let interrupts = nested.vm.run("grep $card /proc/interrupts");
    // One for each queue, and one for the link.
    assert_eq!(interrupts.len(), 3, "{interrupts:?}");
    for line in interrupts.iter().filter(|line| line.contains("x-0")) {
        let count = line.split_whitespace().nth(1).expect("a count");
        assert_ne!(count, "0", "{line}");
    }
}

fn remove_driver(nested: &mut Nested) {
    nested.vm.run_within("rmmod igb", TRAFFIC);
}

fn use_the_card(way: Way) -> Seen {
    eprintln!("{way:?}");
    let setup = Setup::from_environment();
    let mut nested = way.launch(&setup);
    nested.vm.wait_until_up();
    nested.test_dir.note("up");
    let seen = look(&mut nested);
    nested.test_dir.note("looked at");
    exchange_packets(&mut nested);
    let status = nested.control.status();
    assert_eq!(status.dma_of(CARD), "translated");
    assert!(status.requests("map", "ok") > 0, "{}", status.0);
    nested.test_dir.note("packets");

    remove_driver(&mut nested);
    nested.test_dir.note("driver removed");
    nested
        .vm
        .run_within(&format!("echo 1 >{}", file("reset")), TRAFFIC);
    nested.test_dir.note("reset");
    exchange_packets(&mut nested);
    nested.test_dir.note("packets again");
    nested.vm.begin("poweroff -f");
    assert_eq!(nested.vm.wait_for_end().code(), Some(0));
    nested.wait_for_end();
    seen
}

/// The differing bytes: place, and the values.
fn differences(one: &[u8], other: &[u8]) -> Vec<(usize, u8, u8)> {
    assert_eq!((one.len(), other.len()), (4096, 4096));
    let pairs = one.iter().zip(other).enumerate();
    let different = pairs.filter(|(_, (one, other))| one != other);
    different
        .map(|(at, (one, other))| (at, *one, *other))
        .collect()
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn a_stock_guest_uses_a_network_card_and_sees_the_same_each_way() {
    let [shared, others @ ..] = [
        Way::Shared,
        Way::Exported("iommufd"),
        Way::Exported("type1"),
    ]
    .map(|way| {
        let seen = RefCell::new(None);
        with_a_working_guest(|| *seen.borrow_mut() = Some(use_the_card(way)));
        (way, seen.into_inner().expect("seen"))
    });
    let (_, shared) = shared;
    for (way, seen) in others {
        let found = differences(&shared.config, &seen.config);
        assert_eq!(found, [], "{way:?}\n{}", rows(&seen.config));
        assert_eq!(seen, shared, "{way:?}");
    }
}

/// The rows of 16 bytes that are not all zero.
fn rows(config: &[u8]) -> String {
    let rows = config.chunks(16).enumerate();
    let rows = rows.filter(|(_, row)| row.iter().any(|byte| *byte != 0));
    rows.map(|(n, row)| format!("{:03x}: {row:02x?}\n", n * 16))
        .collect()
}

/// Each vector of the card reaches the event that a client has given it, and no other.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn every_vector_of_an_exported_card_reaches_its_event() {
    for host_iommu in ["iommufd", "type1"] {
        eprintln!("{host_iommu}");
        let (daemon, mut client, _folder) = exported(host_iommu);
        client.write(CONFIG, COMMAND, &(MEMORY | MASTER).to_le_bytes());
        let request: Vec<u8> = [16, 0, MSIX, 0]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect();
        let info = client.0.call(IRQ_INFO, &request, &[]);
        assert_eq!((info.errno(), info.u32_at(12)), (0, VECTORS));

        let new_event = |_| eventfd(0, EventfdFlags::CLOEXEC).expect("an event");
        let events: Vec<OwnedFd> = (0..VECTORS).map(new_event).collect();
        for (first, part) in [(0, &events[..4]), (4, &events[4..])] {
            let part: Vec<_> = part.iter().map(AsFd::as_fd).collect();
            let body = irqs(
                DATA_EVENTFD | ACTION_TRIGGER,
                MSIX,
                first,
                part.len() as u32,
            );
            assert_eq!(client.0.call(SET_IRQS, &body, &part).errno(), 0);
        }
        client.write(BAR, GPIE, &GPIE_MULTIPLE.to_le_bytes());
        client.write(BAR, EIMS, &((1u32 << VECTORS) - 1).to_le_bytes());
        for (n, event) in events.iter().enumerate() {
            client.write(BAR, EICS, &(1u32 << n).to_le_bytes());
            assert!(is_raised(event, Duration::from_secs(20)), "vector {n}");
            for (other, event) in events.iter().enumerate() {
                assert!(!is_raised(event, Duration::ZERO), "{other} by {n}");
            }
        }
        let off = irqs(DATA_NONE | ACTION_TRIGGER, MSIX, 0, 0);
        assert_eq!(client.0.call(SET_IRQS, &off, &[]).errno(), 0);
        client.write(BAR, EICS, &1u32.to_le_bytes());
        assert!(!is_raised(&events[0], Duration::from_millis(100)));
        drop(client);
        daemon.terminate();
        daemon.wait_for_end();
    }
}

/// The card goes to sleep, and its registers answer when it is awake again. Its expansion ROM can be read in one message.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn an_exported_card_has_a_rom_and_sleeps_and_wakes_up() {
    for host_iommu in ["iommufd", "type1"] {
        eprintln!("{host_iommu}");
        let (daemon, mut client, _folder) = exported(host_iommu);
        assert_eq!(client.read(ROM, 0) & 0xffff, ROM_SIGNATURE);
        let whole = client
            .0
            .call(REGION_READ, &region(0, ROM, ROM_SIZE, &[]), &[]);
        assert_eq!((whole.errno(), whole.u32_at(12)), (0, ROM_SIZE));
        for state in [3u16, 0, 3, 0] {
            client.write(CONFIG, POWER_STATE, &state.to_le_bytes());
            assert_eq!(client.read(CONFIG, POWER_STATE) & 3, u32::from(state));
            assert_eq!(client.read(CONFIG, 0), IDENTITY, "D{state}");
        }
        client.write(CONFIG, COMMAND, &MEMORY.to_le_bytes());
        assert_ne!(client.load(STATUS), u32::MAX, "the registers answer");
        assert_eq!(client.0.call(RESET, &[], &[]).errno(), 0);
        drop(client);
        daemon.terminate();
        daemon.wait_for_end();
    }
}

/// QEMU reads the card's ROM, and puts the card to sleep, as it does for a guest.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn qemu_shows_the_rom_and_the_power_states_each_way() {
    let card = &words("VIOMMU_IGB")[0];
    let shared = format!("vfio-pci,host={card},iommufd=iommufd,addr=SLOT");
    let shared = through_qemu(&["-object", "iommufd,id=iommufd", "-device", &shared]);
    for (host_iommu, is_kept) in [("iommufd", false), ("type1", false), ("type1", true)] {
        eprintln!("{host_iommu}, kept: {is_kept}");
        let keeper = is_kept.then(Keeper::empty);
        let (daemon, folder) = offered(host_iommu, keeper.as_ref());
        let socket = folder.path().join("igb");
        let device = format!(
            r#"{{"driver":"vfio-user-pci","addr":"SLOT","socket":{{"type":"unix","path":{socket:?}}}}}"#
        );
        let exported = through_qemu(&["-device", &device]);
        if is_kept {
            // QEMU asks for the whole ROM in one message, of which a kept connection takes 64 KiB.
            assert_eq!(exported.trim_start_matches("0x").trim_matches('f'), "");
        } else {
            assert!(exported.starts_with("0x55aa"), "{}", &exported[..100]);
            assert!(exported == shared, "{host_iommu}");
        }
        daemon.terminate();
        daemon.wait_for_end();
    }
}

/// Checks the card's power states. Returns its ROM in hexadecimal digits.
fn through_qemu(arguments: &[&str]) -> String {
    const BAR0: u32 = 0x10;
    const ROM_BAR: u32 = 0x30;
    const ROM_ENABLE: u32 = 1;
    /// Free addresses of the machine.
    const REGISTERS: u32 = 0xc000_0000;
    const ROM_AT: u32 = 0xc100_0000;
    eprintln!("{arguments:?}");
    let mut qemu = Qtest::start(arguments);
    assert_eq!(qemu.config(0), IDENTITY);
    qemu.set_config(ROM_BAR, !ROM_ENABLE);
    assert_eq!(qemu.config(ROM_BAR), !(ROM_SIZE - 1));
    qemu.set_config(ROM_BAR, ROM_AT | ROM_ENABLE);
    qemu.set_config(BAR0, REGISTERS);
    qemu.set_config(COMMAND as u32, u32::from(MEMORY));
    let begun = Instant::now();
    let rom = qemu.read(ROM_AT.into(), ROM_SIZE.into());
    eprintln!("the ROM after {:?}", begun.elapsed());
    assert_ne!(qemu.load(u64::from(REGISTERS) + STATUS), u32::MAX);
    for state in [3, 0, 3, 0] {
        qemu.set_config(POWER_STATE as u32, state);
        assert_eq!(qemu.config(POWER_STATE as u32) & 3, state);
        assert_eq!(qemu.config(0), IDENTITY, "D{state}");
    }
    eprintln!("awake");
    qemu.set_config(COMMAND as u32, u32::from(MEMORY));
    qemu.set_config(BAR0, REGISTERS);
    assert_ne!(qemu.load(u64::from(REGISTERS) + STATUS), u32::MAX);
    rom
}

/// A daemon that exports the card, its client, and the directory of its socket.
fn exported(host_iommu: &str) -> (Daemon, Client, tempfile::TempDir) {
    let (daemon, folder) = offered(host_iommu, None);
    let client = Client::connect(&folder.path().join("igb"));
    (daemon, client, folder)
}

/// A daemon that exports the card, and the directory of its socket.
fn offered(host_iommu: &str, keeper: Option<&Keeper>) -> (Daemon, tempfile::TempDir) {
    let card = &words("VIOMMU_IGB")[0];
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("igb");
    let keys = format!(
        "address = '00:05.0'\nhost-iommu = '{host_iommu}'\n\
         [[endpoint]]\naddress = '00:06.0'\nvfio = '{card}'\nexport = {socket:?}\n"
    );
    let daemon = match keeper {
        Some(keeper) => Daemon::kept_with_config(keeper, &keys, &[]),
        None => Daemon::with_config(&keys),
    };
    (daemon, folder)
}
