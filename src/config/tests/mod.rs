mod devices;
mod hostile;
mod ports;
mod refusals;

use std::io::Write;
use std::path::Path;

use clap::Parser;

use super::text::{parse_number, parse_size};
use super::*;
use crate::args::Args;
use crate::ids::EndpointId;
use crate::topology::{GroupName, PciAddress};

const GOOD: &str = r#"
socket = "/run/vm0/iommu.sock"
control = "/run/vm0/iommu.ctl"
address = "00:05.0"
address-width = 57
bypass = false
granule = "64k"
domains = 256
poll-max-us = 0
realtime-priority = 99
memory = "2G"
arena-limit = "32M"
reserved = [
    { first = 0xfee00000, last = 0xfeefffff, kind = "msi" },
    { first = "0xffffffffffff0000", last = "0xffff_ffff_ffff_ffff" },
]

[[endpoint]]
address = "00:10.0"
group = "nic0"
reserved = [{ first = 0x8000000, last = 0x80fffff, kind = "reserved" }]

[[endpoint]]
range = "01:00.0-01:1f.7"
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::from_text(Path::new("vm0.toml"), text)
}

fn flags(line: &str) -> Result<Config, ConfigError> {
    let words = std::iter::once("vhost-device-iommu").chain(line.split_whitespace());
    Config::try_from(
        &Args::try_parse_from(words)
            .expect("well-formed options")
            .run,
    )
}

fn id(text: &str) -> EndpointId {
    text.parse::<PciAddress>()
        .expect("an address")
        .endpoint_id()
}

#[test]
fn a_full_file_is_understood() {
    let config = parse(GOOD).expect("good");
    assert_eq!(
        config.socket,
        Some(Socket::Path("/run/vm0/iommu.sock".into()))
    );
    assert_eq!(config.control, Some("/run/vm0/iommu.ctl".into()));
    assert_eq!(config.address_width, 57);
    assert!(!config.bypass_at_boot);
    assert_eq!(config.page_mask.bits(), 1 << 16 | 1 << 21 | 1 << 30);
    assert_eq!(config.max_domains, 256);
    assert_eq!(config.longest_poll, Duration::ZERO);
    assert_eq!(config.realtime_priority, Some(99));
    assert_eq!(config.memory, Some(2 << 30));
    assert_eq!(config.arena_limit, 32 << 20);

    let topology = &config.topology;
    assert_eq!(topology.iommu().to_string(), "0000:00:05.0");
    assert_eq!(topology.endpoint_count(), 257);
    assert_eq!(topology.max_reserved_count(), 3);
    let nic = topology.endpoint(id("00:10.0")).expect("an endpoint");
    let group = nic.group.and_then(|group| topology.group_name(group));
    assert_eq!(group.map(GroupName::as_str), Some("nic0"));
    let regions: Vec<_> = nic.reserved.iter().map(ToString::to_string).collect();
    assert_eq!(
        regions,
        [
            "0x8000000..=0x80fffff:reserved",
            "0xfee00000..=0xfeefffff:msi",
            "0xffffffffffff0000..=0xffffffffffffffff:reserved",
        ]
    );
    let other = topology.endpoint(id("01:1f.7")).expect("an endpoint");
    assert_eq!((other.group, other.reserved.len()), (None, 2));
    assert_eq!(topology.endpoint(id("00:05.0")), None);
}

#[test]
fn missing_keys_have_defaults() {
    let config = parse("address = '00:05.0'").expect("enough");
    assert_eq!((&config.socket, &config.control), (&None, &None));
    assert_eq!(config.address_width, 48);
    assert!(config.bypass_at_boot);
    assert_eq!(config.page_mask, PageMask::TABLE);
    assert_eq!(config.max_domains, 65536);
    assert_eq!(config.longest_poll, Duration::from_micros(100));
    assert_eq!(config.realtime_priority, None);
    assert_eq!(config.memory, None);
    assert_eq!(config.arena_limit, 64 << 20);
    let regions = config.topology.common_reserved();
    let regions: Vec<_> = regions.iter().map(ToString::to_string).collect();
    assert_eq!(regions, ["0xfee00000..=0xfeefffff:msi"]);

    let config = parse("address = '00:05.0'\nmemory = '16G'\nreserved = []").expect("enough");
    assert_eq!(config.arena_limit, (16 << 30) / 256 + (64 << 20));
    assert!(config.topology.common_reserved().is_empty());
    let config = parse("address = '00:05.0'\nmemory = '4096T'").expect("enough");
    assert_eq!(config.arena_limit, MAX_ARENA);
}

#[test]
fn each_granule_leaves_out_smaller_pages() {
    for (granule, bits) in [
        ("'4k'", 1 << 12 | 1 << 21 | 1 << 30),
        ("'16K'", 1 << 14 | 1 << 21 | 1 << 30),
        ("'64KiB'", 1 << 16 | 1 << 21 | 1 << 30),
        ("'2m'", 1 << 21 | 1 << 30),
        ("2097152", 1 << 21 | 1 << 30),
    ] {
        let config = parse(&format!("address = '00:05.0'\ngranule = {granule}")).expect(granule);
        assert_eq!(config.page_mask.bits(), bits, "{granule}");
    }
}

#[test]
fn options_alone_are_enough() {
    let config = flags(
        "--socket-path /run/a.sock --control-path /run/a.ctl --iommu 00:05.0 --endpoint 00:10.0 \
         --endpoint 00:11.0-00:11.7 --address-width 39 --bypass off --granule 2m --memory 1G \
         --arena-limit 8M --reserved 0x1000..=0x1fff:msi --reserved 0x4000..=0x5fff:reserved",
    )
    .expect("good options");
    assert_eq!(config.socket, Some(Socket::Path("/run/a.sock".into())));
    assert_eq!(config.control, Some("/run/a.ctl".into()));
    assert_eq!(config.topology.endpoint_count(), 9);
    assert_eq!(config.address_width, 39);
    assert!(!config.bypass_at_boot);
    assert_eq!(config.page_mask.granule(), 2 << 20);
    assert_eq!(config.memory, Some(1 << 30));
    assert_eq!(config.arena_limit, 8 << 20);
    let regions = config.topology.common_reserved();
    let regions: Vec<_> = regions.iter().map(ToString::to_string).collect();
    assert_eq!(regions, ["0x1000..=0x1fff:msi", "0x4000..=0x5fff:reserved"]);

    let config = flags("--fd 3 --iommu 00:05.0 --no-reserved").expect("good options");
    assert_eq!(config.socket, Some(Socket::Fd(3)));
    assert!(config.topology.common_reserved().is_empty());
}

#[test]
fn the_key_of_the_socket_names_the_protocol() {
    let of = |text: &str| parse(&format!("address = '00:05.0'\n{text}")).expect("good");
    let config = of("vfio-user-socket = '/run/a.sock'");
    assert_eq!(config.socket, Some(Socket::Path("/run/a.sock".into())));
    assert_eq!(config.transport, VmmTransport::VirtioPci);
    assert_eq!(of("socket = 's'").transport, VmmTransport::VhostUser);
    assert_eq!(of("").transport, VmmTransport::VhostUser);

    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(b"address = '00:05.0'\nvfio-user-socket = 's'\n")
        .expect("written");
    let path = file.path().display();
    // An inherited socket speaks the protocol of the file.
    let config = flags(&format!("--config {path} --fd 3")).expect("good");
    assert_eq!(config.socket, Some(Socket::Fd(3)));
    assert_eq!(config.transport, VmmTransport::VirtioPci);
    let refused = flags(&format!("--config {path} --socket-path t")).expect_err("two protocols");
    assert!(refused.to_string().contains("leave one of them out"));
    let same = "address = '00:05.0'\nvfio-user-socket = 's'\ncontrol = 's'";
    assert!(parse(same).is_err());
}

#[test]
fn options_override_the_file() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(GOOD.as_bytes()).expect("written");
    let path = file.path().display();

    let config = flags(&format!("--config {path}")).expect("the file alone");
    let named = Config {
        name: config.name.clone(),
        vfio_helper: config.vfio_helper.clone(),
        ..parse(GOOD).expect("good")
    };
    assert_eq!(config, named);

    let config = flags(&format!(
        "--config {path} --fd 7 --iommu 00:06.0 --endpoint 02:00.0 --bypass on --granule 4k \
         --address-width 40 --memory 4G --arena-limit 1M --no-reserved --control-path c"
    ))
    .expect("both");
    assert_eq!(config.socket, Some(Socket::Fd(7)));
    assert_eq!(config.control, Some("c".into()));
    assert_eq!(config.topology.iommu().to_string(), "0000:00:06.0");
    assert_eq!(config.topology.endpoint_count(), 1);
    assert!(config.bypass_at_boot);
    assert_eq!(config.page_mask.granule(), 4096);
    assert_eq!(config.address_width, 40);
    assert_eq!(config.memory, Some(4 << 30));
    assert_eq!(config.arena_limit, 1 << 20);
    assert!(config.topology.common_reserved().is_empty());
    assert_eq!(config.max_domains, 256, "kept from the file");
}

#[test]
fn numbers_and_sizes_are_read_strictly() {
    assert_eq!(parse_number("0xFfff_ffff_ffff_ffff"), Some(u64::MAX));
    assert_eq!(parse_number("18446744073709551615"), Some(u64::MAX));
    for bad in [
        "",
        "0x",
        "_1",
        "+1",
        "-1",
        "1a",
        "0x_1",
        "18446744073709551616",
        " 1",
    ] {
        assert_eq!(parse_number(bad), None, "{bad:?}");
    }
    assert_eq!(parse_size("0"), Some(0));
    assert_eq!(parse_size("3 GiB"), Some(3 << 30));
    assert_eq!(parse_size("16777215T"), Some(16_777_215 << 40));
    for bad in [
        "",
        "k",
        "-1",
        "+1",
        "1.5G",
        "1 GG",
        "1ib",
        "16777216T",
        "1G ",
    ] {
        assert_eq!(parse_size(bad), None, "{bad:?}");
    }
}

#[test]
fn the_summary_prints_every_setting() {
    let summary = parse(GOOD).expect("good").summary().to_string();
    for line in [
        "socket:           /run/vm0/iommu.sock",
        "name:             vm0",
        "control socket:   /run/vm0/iommu.ctl, mode 0600",
        "worker:           up to 64 requests at a time, polls up to 0ns",
        "faults:           up to 100 a second of an endpoint",
        "IOMMU address:    0000:00:05.0",
        "address width:    57 bits",
        "page sizes:       64 KiB 2 MiB 1 GiB",
        "bypass at boot:   off",
        "domains:          up to 256",
        "guest memory:     2 GiB",
        "page-table arena: up to 32 MiB",
        "reserved regions: 0xfee00000..=0xfeefffff:msi 0xffffffffffff0000..=0xffffffffffffffff:reserved",
        "endpoints:        257, host groups: 1",
        "  0000:00:10.0 group nic0 reserved 0x8000000..=0x80fffff:reserved 0xfee00000..=0xfeefffff:msi 0xffffffffffff0000..=0xffffffffffffffff:reserved",
        "  0000:01:00.0-0000:01:1f.7",
    ] {
        assert!(
            summary.lines().any(|found| found == line),
            "{line} in\n{summary}"
        );
    }
}
