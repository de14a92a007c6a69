use std::collections::BTreeMap;
use std::io::Write;

use clap::Parser;
use proptest::prelude::*;

use super::*;
use crate::args::Args;
use crate::ids::EndpointId;

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
fn what_is_left_out_has_a_default() {
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
fn options_override_the_file() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(GOOD.as_bytes()).expect("written");
    let path = file.path().display();

    let config = flags(&format!("--config {path}")).expect("the file alone");
    let named = Config {
        name: config.name.clone(),
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

/// Each text is refused at the place given, in words that name what is wrong and the cure.
#[test]
fn refusals_name_place_and_cure() {
    let address = "address = '00:05.0'\n";
    let long = format!("socket = '/{}'", "x".repeat(107));
    let regions: String = (0..65u64)
        .map(|n| format!("{{ first = {}, last = {} }}, ", n << 13, (n << 13) + 0xfff))
        .collect();
    let too_many_regions = format!("reserved = [{regions}]");
    let cases: &[(&str, &str, &[&str])] = &[
        // Keys and types.
        (
            "sockt = 'a'",
            "vm0.toml:2: ",
            &["unknown key `sockt`", "`socket`", "remove it"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\ngroups = 'a'",
            "vm0.toml:4: ",
            &["unknown key `groups`", "`group`"],
        ),
        (
            "reserved = [{ first = 0, size = 4096 }]",
            "vm0.toml:2: ",
            &["unknown key `size`", "`last`"],
        ),
        (
            "socket = 'a'\nsocket = 'b'",
            "vm0.toml:3: ",
            &["duplicate key", "keep one"],
        ),
        (
            "socket = 5",
            "vm0.toml:2: socket: ",
            &["a path as a text", "not a number"],
        ),
        ("socket = ", "vm0.toml:2: ", &["correct the TOML"]),
        ("endpoint = 3", "vm0.toml:2: ", &["[[endpoint]]"]),
        (
            "[endpoint]\naddress = '00:10.0'",
            "vm0.toml:2: ",
            &["[[endpoint]]"],
        ),
        (
            "endpoint = [3]",
            "vm0.toml:2: ",
            &["invalid type", "write a table"],
        ),
        ("reserved = 3", "vm0.toml:2: ", &["list of tables"]),
        (
            "bypass = 'on'",
            "vm0.toml:2: bypass: ",
            &["must be true or false", "not a text"],
        ),
        (
            "bypass = 1979-05-27",
            "vm0.toml:2: bypass: ",
            &["not a table or a date"],
        ),
        (
            "domains = 1.5",
            "vm0.toml:2: domains: ",
            &["a number", "not a fraction"],
        ),
        (
            "memory = ['2G']",
            "vm0.toml:2: memory: ",
            &["a size", "not a list"],
        ),
        // Sockets.
        (
            "socket = ''",
            "vm0.toml:2: socket: ",
            &["is empty", "such as /run"],
        ),
        (
            "control = ''",
            "vm0.toml:2: control: ",
            &["is empty", "such as /run"],
        ),
        (
            &long,
            "vm0.toml:2: socket: ",
            &["108 bytes", "107", "shorter"],
        ),
        (
            "socket = \"a\\u0000b\"",
            "vm0.toml:2: socket: ",
            &["control character"],
        ),
        (
            "socket = 'a'\ncontrol = 'a'",
            "vm0.toml:3: control: ",
            &["same path", "use another"],
        ),
        // Numbers.
        (
            "address-width = 31",
            "vm0.toml:2: address-width: ",
            &["31 bits", "32 to 57"],
        ),
        (
            "address-width = 58",
            "vm0.toml:2: address-width: ",
            &["58 bits", "32 to 57"],
        ),
        (
            "address-width = -1",
            "vm0.toml:2: address-width: ",
            &["-1 bits", "32 to 57"],
        ),
        (
            "granule = '8k'",
            "vm0.toml:2: granule: ",
            &["\"8k\"", "\"16k\""],
        ),
        (
            "granule = '1G'",
            "vm0.toml:2: granule: ",
            &["\"1G\"", "\"2m\""],
        ),
        ("granule = 0", "vm0.toml:2: granule: ", &["\"0\"", "\"4k\""]),
        (
            "domains = 0",
            "vm0.toml:2: domains: ",
            &["0 domains", "1 to 65536"],
        ),
        (
            "poll-max-us = -1",
            "vm0.toml:2: poll-max-us: ",
            &["-1 microseconds", "0 (never poll) to 10000"],
        ),
        (
            "poll-max-us = 10001",
            "vm0.toml:2: poll-max-us: ",
            &["10001 microseconds", "0 (never poll) to 10000"],
        ),
        (
            "realtime-priority = 0",
            "vm0.toml:2: realtime-priority: ",
            &["0 is no realtime priority", "1 to 99"],
        ),
        (
            "realtime-priority = 100",
            "vm0.toml:2: realtime-priority: ",
            &["100 is no realtime priority", "1 to 99"],
        ),
        (
            "domains = 65537",
            "vm0.toml:2: domains: ",
            &["65537", "1 to 65536"],
        ),
        (
            "memory = 0",
            "vm0.toml:2: memory: ",
            &["0 bytes", "multiple of 1M"],
        ),
        (
            "memory = '4097K'",
            "vm0.toml:2: memory: ",
            &["multiple of 1M"],
        ),
        ("memory = '4097T'", "vm0.toml:2: memory: ", &["up to 4096T"]),
        (
            "memory = 'lots'",
            "vm0.toml:2: memory: ",
            &["\"lots\"", "such as \"2G\""],
        ),
        (
            "memory = '99999999T'",
            "vm0.toml:2: memory: ",
            &["such as \"2G\""],
        ),
        (
            "memory = -5",
            "vm0.toml:2: memory: ",
            &["\"-5\"", "such as \"2G\""],
        ),
        (
            "arena-limit = 1048575",
            "vm0.toml:2: arena-limit: ",
            &["too few", "1M"],
        ),
        (
            "arena-limit = '1025G'",
            "vm0.toml:2: arena-limit: ",
            &["at most 1T"],
        ),
        // Reserved regions.
        (
            "reserved = [{ first = 0x2000, last = 0x1fff }]",
            "vm0.toml:2: reserved[0]: ",
            &["ends at 0x1fff", "before its start 0x2000", "into `first`"],
        ),
        (
            "reserved = [{ first = 0x1000, last = 0x2000 }]",
            "vm0.toml:2: reserved[0]: ",
            &["0x1000..=0x2000", "4 KiB", "0x1000..=0x2fff"],
        ),
        (
            "reserved = [{ first = 0x1001, last = 0x1fff }]",
            "vm0.toml:2: reserved[0]: ",
            &["0x1000..=0x1fff"],
        ),
        (
            "reserved = [{ first = 0x1000 }]",
            "vm0.toml:2: reserved[0].last: ",
            &["is missing", "`first` and `last`"],
        ),
        (
            "reserved = [{ first = -1, last = '0x1_0000_0000_0000_0000' }]",
            "vm0.toml:2: reserved[0].first: ",
            &["\"-1\"", "2^64 - 1", "vm0.toml:2: reserved[0].last: "],
        ),
        (
            "reserved = [{ first = true, last = 0xfff }]",
            "vm0.toml:2: reserved[0].first: ",
            &["must be an address"],
        ),
        (
            "reserved = [{ first = 0, last = 0xfff, kind = 'rmrr' }]",
            "vm0.toml:2: reserved[0].kind: ",
            &["\"rmrr\"", "\"reserved\" or \"msi\""],
        ),
        (
            "reserved = [{ first = 0, last = 0x1fff },\n{ first = 0x1000, last = 0x2fff }]",
            "vm0.toml:2: reserved: ",
            &[
                "0x0..=0x1fff:reserved",
                "0x1000..=0x2fff:reserved",
                "make one region",
            ],
        ),
        (
            "reserved = [{ first = 0, last = 0xfff, kind = 'msi' },\n\
             { first = 0x1000, last = 0x1fff, kind = 'msi' }]",
            "vm0.toml:2: reserved: ",
            &["0x0..=0xfff:msi", "0x1000..=0x1fff:msi", "leave one out"],
        ),
        (
            &too_many_regions,
            "vm0.toml:2: reserved: ",
            &["65 reserved regions", "64", "join"],
        ),
        (
            "reserved = [{ first = 0, last = 0xfff, kind = 'msi' }]\n[[endpoint]]\n\
             address = '00:10.0'\nreserved = [{ first = 0x1000, last = 0x1fff, kind = 'msi' }]",
            "vm0.toml:5: endpoint[0].reserved: ",
            &[
                "0x0..=0xfff:msi",
                "0x1000..=0x1fff:msi",
                "each endpoint its own",
            ],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\n\
             reserved = [{ first = 0x1000, last = 0x1fff, kind = 'msi' }]",
            "vm0.toml:4: endpoint[0].reserved: ",
            &["0xfee00000..=0xfeefffff:msi", "`reserved = []`"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\n\
             reserved = [{ first = 0xfeef0000, last = 0xfeffffff }]",
            "vm0.toml:4: endpoint[0].reserved: ",
            &["overlap", "`reserved = []`"],
        ),
        // Passthrough.
        (
            "host-iommu = 'vfio'",
            "vm0.toml:2: host-iommu: ",
            &["\"vfio\"", "\"iommufd\" or", "\"type1\""],
        ),
        (
            "host-iommu = true",
            "vm0.toml:2: host-iommu: ",
            &["must be \"iommufd\" or \"type1\"", "not true or false"],
        ),
        (
            "pin = 'none'",
            "vm0.toml:2: pin: ",
            &["\"none\"", "\"all\"", "\"mapped\""],
        ),
        ("pin = 1", "vm0.toml:2: pin: ", &["must be \"all\" or"]),
        (
            "vfio = '65:00.0'",
            "vm0.toml:2: ",
            &["unknown key `vfio`", "remove it"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nvfio = '65:00'",
            "vm0.toml:4: endpoint[0].vfio: ",
            &["\"65:00\" is not a PCI address", "such as 00:05.0"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nvfio = 65",
            "vm0.toml:4: endpoint[0].vfio: ",
            &["a PCI address as a text"],
        ),
        (
            "[[endpoint]]\nrange = '00:10.0-00:10.1'\nvfio = '65:00.0'",
            "vm0.toml:4: endpoint[0].vfio: ",
            &[
                "0000:00:10.0-0000:00:10.1 is more than one function",
                "its own [[endpoint]]",
            ],
        ),
        (
            "[[endpoint]]\naddress = '00:11.0'\nvfio = '65:00.0'\n\
             [[endpoint]]\naddress = '00:10.0'\nvfio = '0000:65:00.0'",
            "vm0.toml:7: endpoint[1].vfio: ",
            &[
                "the host's device 0000:65:00.0 is endpoint 0000:00:11.0 already",
                "remove one",
            ],
        ),
        (
            "[[endpoint]]\naddress = 'x'\nvfio = 'y'",
            "vm0.toml:3: endpoint[0].address: ",
            &["vm0.toml:4: endpoint[0].vfio: "],
        ),
        // Devices that follow the page tables.
        (
            "[[endpoint]]\naddress = '00:10.0'\nshadow = ''",
            "vm0.toml:4: endpoint[0].shadow: ",
            &["is empty; give the path"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nshadow = 5",
            "vm0.toml:4: endpoint[0].shadow: ",
            &["a path as a text"],
        ),
        (
            "[[endpoint]]\nrange = '00:10.0-00:10.1'\nshadow = '/s'",
            "vm0.toml:4: endpoint[0].shadow: ",
            &["more than one function", "they may have one path"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nshadow = '/s'\nvfio = '65:00.0'",
            "vm0.toml:4: endpoint[0].shadow: ",
            &["one device; leave out"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nshadow = '/s'\nvfio-user = { listen = '/l', connect = '/n' }",
            "vm0.toml:4: endpoint[0].shadow: ",
            &["one device; leave out"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nshadow = '/s'\n[[endpoint]]\naddress = '00:11.0'\nvfio-user = { listen = '/s', connect = '/n' }",
            "vm0.toml:7: endpoint[1].vfio-user: ",
            &["listens there already"],
        ),
        (
            "control = '/c'\n[[endpoint]]\naddress = '00:10.0'\nshadow = '/c'",
            "vm0.toml:5: endpoint[0].shadow: ",
            &["for control; use another"],
        ),
        (
            "socket = '/v'\n[[endpoint]]\naddress = '00:10.0'\nshadow = '/v'",
            "vm0.toml:5: endpoint[0].shadow: ",
            &["for the VMM or", "use another"],
        ),
        // Endpoints.
        (
            "[[endpoint]]\naddress = '00:20.0'",
            "vm0.toml:3: endpoint[0].address: ",
            &["\"00:20.0\" is not a PCI address", "such as 00:05.0"],
        ),
        (
            "[[endpoint]]\naddress = 16",
            "vm0.toml:3: endpoint[0].address: ",
            &["a PCI address as a text"],
        ),
        (
            "[[endpoint]]",
            "vm0.toml:2: endpoint[0]: ",
            &["give `address ="],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nrange = '00:11.0-00:12.0'",
            "vm0.toml:4: endpoint[0].range: ",
            &["both", "keep one"],
        ),
        (
            "[[endpoint]]\nrange = '00:1f.0-00:10.0'",
            "vm0.toml:3: endpoint[0].range: ",
            &[
                "ends at 0000:00:10.0",
                "before its start",
                "lower address first",
            ],
        ),
        (
            "[[endpoint]]\nrange = '0000:00:10.0-0001:00:10.0'",
            "vm0.toml:3: endpoint[0].range: ",
            &["different segments", "one range for each"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\ngroup = 'two words'",
            "vm0.toml:4: endpoint[0].group: ",
            &["\"two words\"", "such as \"nic0\""],
        ),
        (
            "[[endpoint]]\naddress = '00:05.0'",
            "vm0.toml:3: endpoint[0].address: ",
            &[
                "IOMMU's own address 0000:00:05.0",
                "leave that function out",
            ],
        ),
        (
            "[[endpoint]]\nrange = '00:00.0-00:1f.7'",
            "vm0.toml:3: endpoint[0].range: ",
            &["IOMMU's own address", "split the range"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\n[[endpoint]]\naddress = '0000:00:10.0'",
            "vm0.toml:5: endpoint[1].address: ",
            &["0000:00:10.0 is given twice", "remove one"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.5'\n[[endpoint]]\nrange = '00:10.0-00:10.7'",
            "vm0.toml:5: endpoint[1].range: ",
            &[
                "0000:00:10.5",
                "0000:00:10.0-0000:00:10.7",
                "overlap",
                "one of them",
            ],
        ),
        (
            "[[endpoint]]\nrange = '0001:00:00.0-0001:ff:1f.7'\n[[endpoint]]\naddress = '00:10.0'",
            "vm0.toml:5: endpoint[1].address: ",
            &["65537 endpoints", "65536 are possible", "narrower"],
        ),
    ];
    for (text, place, parts) in cases {
        let error = parse(&format!("{address}{text}\n")).expect_err(text);
        let message = error.to_string();
        assert!(message.starts_with(place), "{text}: {message}");
        for part in *parts {
            assert!(message.contains(part), "{text}: no {part:?} in {message}");
        }
    }
}

#[test]
fn the_address_of_the_iommu_is_demanded() {
    let message = parse("socket = 'a'").expect_err("no address").to_string();
    assert!(
        message.starts_with("vm0.toml: address: is missing; "),
        "{message}"
    );
    assert!(message.contains("`address = \"00:05.0\"`"), "{message}");
    let message = parse("address = 'five'")
        .expect_err("no address")
        .to_string();
    assert!(
        message.starts_with("vm0.toml:1: address: \"five\" is not"),
        "{message}"
    );
}

#[test]
fn options_are_refused_by_name() {
    for (line, place, cure) in [
        ("--iommu 00:05.0", "--socket-path: is missing", "--fd"),
        ("--fd 3", "--iommu: is missing", "--iommu 00:05.0"),
        (
            "--fd 3 --iommu x",
            "--iommu: \"x\" is not",
            "such as 00:05.0",
        ),
        (
            "--fd 3 --iommu 00:05.0 --endpoint 00:5.0",
            "--endpoint: ",
            "leave that function out",
        ),
        (
            "--fd 3 --iommu 00:05.0 --endpoint 0-1",
            "--endpoint: \"0-1\": ",
            "such as",
        ),
        (
            "--fd 3 --iommu 00:05.0 --granule 3k",
            "--granule: \"3k\"",
            "\"4k\"",
        ),
        (
            "--fd 3 --iommu 00:05.0 --address-width 99",
            "--address-width: 99",
            "32 to 57",
        ),
        (
            "--fd 3 --iommu 00:05.0 --memory 1",
            "--memory: 1 bytes",
            "multiple of 1M",
        ),
        (
            "--fd 3 --iommu 00:05.0 --arena-limit 1",
            "--arena-limit: 1 bytes",
            "at least 1M",
        ),
        (
            "--fd 3 --iommu 00:05.0 --reserved 0-1",
            "--reserved: \"0-1\"",
            "FIRST..=LAST:msi",
        ),
        (
            "--fd 3 --iommu 00:05.0 --reserved 0..=1:msi",
            "--reserved: the region",
            "4 KiB",
        ),
        (
            "--fd 3 --iommu 00:05.0 --reserved 0..=x:msi",
            "--reserved: \"x\"",
            "2^64 - 1",
        ),
        (
            "--fd 3 --iommu 00:05.0 --reserved 0..=0xfff:x",
            "--reserved: \"x\"",
            "\"msi\"",
        ),
    ] {
        let message = flags(line).expect_err(line).to_string();
        assert!(message.starts_with(place), "{line}: {message}");
        assert!(message.contains(cure), "{line}: no {cure:?} in {message}");
    }
}

const DEVICES: &str = r#"
address = "00:05.0"

[[endpoint]]
range = "00:12.0-00:12.7"

[[endpoint]]
address = "00:11.0"
vfio = "66:00.1"

[[endpoint]]
range = "00:10.0"
vfio = "0001:65:00.0"
"#;

#[test]
fn shadow_endpoints_have_sockets_and_may_share_one() {
    let config = parse(
        "address = '00:05.0'\n[[endpoint]]\naddress = '00:11.0'\nshadow = '/a'\n\
         [[endpoint]]\nrange = '00:10.0'\nshadow = '/a'\n[[endpoint]]\naddress = '00:12.0'",
    )
    .expect("good");
    let listener = |endpoint: &str| ShadowListener {
        endpoint: endpoint.parse().expect("an address"),
        path: "/a".into(),
    };
    assert_eq!(config.shadow, [listener("00:10.0"), listener("00:11.0")]);
    let summary = config.summary().to_string();
    assert!(summary.contains("0000:00:11.0 shadow /a\n"), "{summary}");
}

fn passthrough(endpoint: &str, host: &str) -> Passthrough {
    Passthrough {
        endpoint: endpoint.parse().expect("an address"),
        host: host.parse().expect("an address"),
    }
}

/// What the options make of `DEVICES`, with `key` at its top.
fn devices(key: &str, line: &str) -> Result<Config, ConfigError> {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    write!(file, "{key}\n{DEVICES}").expect("written");
    let path = file.path().display();
    flags(&format!("--config {path} --fd 3 {line}"))
}

#[test]
fn devices_of_the_host_are_endpoints() {
    let config = parse(DEVICES).expect("good");
    let known = [
        passthrough("00:10.0", "0001:65:00.0"),
        passthrough("00:11.0", "66:00.1"),
    ];
    assert_eq!(config.passthrough, known);
    assert_eq!(config.topology.endpoint_count(), 10);
    assert_eq!(
        (config.host_iommu, config.pin),
        (HostIommu::Iommufd, Pin::All)
    );
    assert_eq!(config.descriptors, Descriptors::default());

    let text = format!("host-iommu = 'type1'\npin = 'mapped'\n{DEVICES}");
    let config = parse(&text).expect("good");
    assert_eq!(
        (config.host_iommu, config.pin),
        (HostIommu::Type1, Pin::Mapped)
    );
    let config = parse(&format!("host-iommu = 'iommufd'\npin = 'all'\n{DEVICES}")).expect("good");
    assert_eq!(config, parse(DEVICES).expect("the same"));

    let config = devices("", "--endpoint 00:10.0").expect("good");
    assert!(config.passthrough.is_empty(), "the file's are replaced");
}

#[test]
fn descriptors_are_those_of_endpoints() {
    let (first, second) = (
        "00:10.0".parse().expect("an address"),
        "00:11.0".parse().expect("an address"),
    );
    let line = "--iommufd-fd 7 --vfio-fd 0000:00:11.0=9 --vfio-fd 00:10.0=8";
    let both = Descriptors {
        iommufd: Some(7),
        devices: BTreeMap::from([(first, 8), (second, 9)]),
        containers: BTreeMap::new(),
    };
    assert_eq!(devices("", line).expect("good").descriptors, both);
    let one = devices("", "--iommufd-fd 7").expect("devices are opened by path");
    assert_eq!(one.descriptors.iommufd, Some(7));

    let line = "--vfio-fd 00:10.0=8 --vfio-container-fd 00:10.0=9 --vfio-container-fd 00:11.0=10";
    let config = devices("host-iommu = 'type1'", line).expect("good");
    assert_eq!(config.descriptors.devices, BTreeMap::from([(first, 8)]));
    let containers = BTreeMap::from([(first, 9), (second, 10)]);
    assert_eq!(config.descriptors.containers, containers);

    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(DEVICES.as_bytes()).expect("written");
    let given = DescriptorArgs {
        iommufd_fd: Some(7),
        vfio_fd: vec!["00:10.0=8".into(), "00:11.0=9".into()],
    };
    let config = Config::with_descriptors(file.path(), &given).expect("no socket is needed");
    assert_eq!(config.descriptors, both);
    let bad = DescriptorArgs {
        iommufd_fd: None,
        ..given
    };
    Config::with_descriptors(file.path(), &bad).expect_err("no iommufd");
}

#[test]
fn descriptors_of_something_else_are_refused() {
    let iommufd = "host-iommu = 'iommufd'";
    let type1 = "host-iommu = 'type1'";
    for (key, line, place, cure) in [
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 00:10.0",
            "--vfio-fd: \"00:10.0\" is no descriptor",
            "00:10.0=4",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 00:10.0=+8",
            "--vfio-fd: \"00:10.0=+8\"",
            "ADDRESS=N",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 00:10.0=",
            "--vfio-fd: \"00:10.0=\"",
            "ADDRESS=N",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 00:10.0=2147483648",
            "--vfio-fd: \"00:10.0=2147483648\"",
            "ADDRESS=N",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd x=8",
            "--vfio-fd: \"x=8\"",
            "ADDRESS=N",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 00:12.0=8",
            "--vfio-fd: 0000:00:12.0 is no endpoint with `vfio`",
            "give the endpoint's address in the guest",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 65:00.0=8",
            "--vfio-fd: 0000:65:00.0 is no endpoint with `vfio`",
            "give the endpoint's address in the guest",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 00:10.0=8 --vfio-fd 0:10.0=9",
            "--vfio-fd: endpoint 0000:00:10.0 is given twice",
            "remove one",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 00:10.0=8 --vfio-fd 0:11.0=8",
            "--vfio-fd: descriptor 8 is given by --vfio-fd already",
            "its own",
        ),
        (
            iommufd,
            "--iommufd-fd 3",
            "--iommufd-fd: descriptor 3 is given by --fd already",
            "its own",
        ),
        (
            iommufd,
            "--ready-fd 4 --iommufd-fd 4",
            "--iommufd-fd: descriptor 4 is given by --ready-fd already",
            "its own",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 00:10.0=7",
            "--vfio-fd: descriptor 7 is given by --iommufd-fd already",
            "its own",
        ),
        (
            iommufd,
            "--vfio-fd 00:10.0=7",
            "--vfio-fd: a device can be used only through the iommufd",
            "--iommufd-fd",
        ),
        (
            iommufd,
            "--vfio-container-fd 00:10.0=7",
            "--vfio-container-fd: a container is of no use",
            "`host-iommu = \"type1\"`",
        ),
        (
            type1,
            "--iommufd-fd 7",
            "--iommufd-fd: an iommufd is of no use",
            "`host-iommu = \"iommufd\"`",
        ),
        (
            type1,
            "--vfio-fd 00:11.0=8 --vfio-container-fd 00:10.0=7",
            "--vfio-fd: the device of endpoint 0000:00:11.0",
            "--vfio-container-fd",
        ),
        (
            type1,
            "--vfio-container-fd 00:12.0=7",
            "--vfio-container-fd: 0000:00:12.0 is no endpoint with `vfio`",
            "its [[endpoint]]",
        ),
    ] {
        let message = devices(key, line).expect_err(line).to_string();
        assert!(message.starts_with(place), "{line}: {message}");
        assert!(message.contains(cure), "{line}: no {cure:?} in {message}");
        assert_eq!(message.lines().count(), 1, "{line}: {message}");
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let absent = Path::new("/nonexistent/vm0.toml");
    let message = Config::from_file(absent).expect_err("absent").to_string();
    assert!(
        message.starts_with("/nonexistent/vm0.toml: cannot be read"),
        "{message}"
    );

    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(b"address = '\xff'").expect("written");
    let message = Config::from_file(file.path())
        .expect_err("no text")
        .to_string();
    assert!(message.contains("UTF-8"), "{message}");

    let mut file = tempfile::NamedTempFile::new().expect("a file");
    let whole = usize::try_from(MAX_FILE).expect("small");
    let text = "address = '00:05.0'\n";
    file.write_all(text.as_bytes()).expect("written");
    file.write_all(&vec![b'\n'; whole - text.len()])
        .expect("written");
    Config::from_file(file.path()).expect("as long as is allowed");
    file.write_all(b"\n").expect("written");
    let message = Config::from_file(file.path())
        .expect_err("too long")
        .to_string();
    assert!(message.contains("longer than 1048576 bytes"), "{message}");

    // Without an end, and yet read no further than the cap.
    let message = Config::from_file(Path::new("/dev/zero"))
        .expect_err("endless")
        .to_string();
    assert!(message.contains("longer than"), "{message}");
}

#[test]
fn every_problem_is_reported_up_to_a_limit() {
    let error = parse("address = 'x'\ngranule = 'y'\nmemory = 'z'\n[[endpoint]]")
        .expect_err("four problems");
    assert_eq!((error.problems.len(), error.omitted), (4, 0));
    let kinds: [fn(&ProblemKind) -> bool; 4] = [
        |kind| matches!(kind, ProblemKind::Granule(_)),
        |kind| matches!(kind, ProblemKind::Size(_)),
        |kind| matches!(kind, ProblemKind::Pci { .. }),
        |kind| matches!(kind, ProblemKind::NoAddress),
    ];
    for (kind, problem) in kinds.iter().zip(&error.problems) {
        assert!(kind(&problem.kind), "{problem}");
    }

    let many = format!(
        "address = '00:05.0'\nendpoint = [{}]",
        "{},".repeat(300_000)
    );
    let error = parse(&many).expect_err("many problems");
    assert_eq!(error.problems.len(), MAX_PROBLEMS);
    assert_eq!(error.omitted, 300_000 - MAX_PROBLEMS);
    assert!(
        error
            .to_string()
            .ends_with("and 299980 more of such problems")
    );
}

#[test]
fn messages_carry_no_control_characters() {
    for text in [
        "\"\\u001b[2J\" = 1",
        "\u{7f}\u{1b}[2J",
        "granule = \"\\u001b[2J\"",
    ] {
        let message = parse(text).expect_err(text).to_string();
        assert!(!message.contains(['\u{1b}', '\u{7f}']), "{message:?}");
        assert!(message.contains("\\u{1b}"), "made visible: {message}");
    }
}

#[test]
fn nesting_does_not_exhaust_the_stack() {
    for text in ["[", "a=[", "a={b="] {
        parse(&text.repeat(200_000)).expect_err("no configuration");
    }
    parse(&format!("socket = {}", "[".repeat(900_000))).expect_err("no configuration");
    parse(&format!("{}a = 1", "a.".repeat(400_000))).expect_err("no configuration");
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
fn the_summary_says_everything() {
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

#[test]
fn the_summary_names_devices_of_the_host() {
    let summary = parse(DEVICES).expect("good").summary().to_string();
    for line in [
        "host IOMMU:       iommufd, pins all",
        "  0000:00:10.0 vfio 0001:65:00.0",
        "  0000:00:12.0-0000:00:12.7",
    ] {
        assert!(
            summary.lines().any(|found| found == line),
            "{line} in\n{summary}"
        );
    }
    let summary = parse(GOOD).expect("good").summary().to_string();
    assert!(!summary.contains("host IOMMU:"), "{summary}");
}

/// A piece of configuration, whole or broken.
fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        "(socket|control|address|address-width|bypass|granule|domains|memory|arena-limit|reserved|\
          endpoint|group|vfio|host-iommu|pin|range|first|last|kind) = ",
        "(true|-?[0-9]{1,20}|0x[0-9a-f]{1,17}|'[0-9a-f:.-]{0,16}'|\"\\PC{0,8}\"|[0-9]+\\.[0-9])\n",
        Just("[[endpoint]]\n".to_owned()),
        Just("{ first = 0, last = 0xfff }".to_owned()),
        "[\\[\\]{},\n =]{1,4}",
    ]
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,64}") {
        let _ = parse(&text);
    }

    #[test]
    fn no_mixture_of_fragments_panics(parts in proptest::collection::vec(fragment(), 0..24)) {
        let _ = parse(&parts.concat()).map(|config| config.summary().to_string());
    }

    #[test]
    fn no_mutation_of_a_good_file_panics(
        edits in proptest::collection::vec((0..GOOD.len(), any::<u8>(), 0..3u8), 1..8),
    ) {
        let mut bytes = GOOD.as_bytes().to_vec();
        for (at, byte, how) in edits {
            let at = at % bytes.len();
            match how {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.remove(at)),
            }
        }
        if let Err(error) = parse(&String::from_utf8_lossy(&bytes)) {
            prop_assert!(!error.problems.is_empty());
            prop_assert!(error.to_string().starts_with("vm0.toml"));
        }
    }

    #[test]
    fn a_digit_changed_in_a_good_file_is_refused_or_taken(at in 0..GOOD.len(), digit in "[0-9a-f]") {
        let mut bytes = GOOD.as_bytes().to_vec();
        if bytes[at].is_ascii_hexdigit() {
            bytes[at] = digit.as_bytes()[0];
        }
        if let Ok(config) = parse(&String::from_utf8_lossy(&bytes)) {
            prop_assert!(config.topology.endpoint(config.topology.iommu().endpoint_id()).is_none());
            prop_assert!((MIN_WIDTH..=MAX_WIDTH).contains(&config.address_width));
            prop_assert!((MIN_ARENA..=MAX_ARENA).contains(&config.arena_limit));
        }
    }
}
