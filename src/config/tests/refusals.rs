//! Each refusal names the place and the cure.

use std::io::Write;
use std::path::Path;

use super::{flags, parse};
use crate::config::{Config, MAX_FILE, MAX_PROBLEMS, ProblemKind};

/// Each text is refused with a message that names the place, the problem and the cure.
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
        // Slips with tables and lists.
        (
            "endpoint = ['00:10.0', '00:11.0']",
            "vm0.toml:2: ",
            &[
                "must be a table for each endpoint: `[[endpoint]]`",
                "not the text \"00:10.0\"",
            ],
        ),
        (
            "endpoint = [['00:10.0']]",
            "vm0.toml:2: ",
            &["must be a table for each endpoint", "not a list"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nvfio-user = '/run/nvme.sock'",
            "vm0.toml:4: ",
            &["must be a table such as { listen = ", "not the text"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nmemory = '1G'",
            "vm0.toml:4: ",
            &[
                "`memory` cannot stand here",
                "above the first `[[endpoint]]`",
            ],
        ),
        (
            "[metrics]\ntextfile = '/t.prom'\nsocket-mode = '0660'",
            "vm0.toml:4: ",
            &["`socket-mode` cannot stand here", "and the first table"],
        ),
        (
            "vfio = '65:00.0'",
            "vm0.toml:2: ",
            &["`vfio` cannot stand here", "under the `[[endpoint]]`"],
        ),
        (
            "textfile = '/t.prom'",
            "vm0.toml:2: ",
            &["`textfile` cannot stand here", "under `[metrics]`"],
        ),
        (
            "metrics = '/run/m.sock'",
            "vm0.toml:2: ",
            &["must be a table: `[metrics]`", "not the text"],
        ),
        (
            "readers = [1001]",
            "vm0.toml:2: ",
            &["must be a", "`[readers]`"],
        ),
        (
            "hotplug = '01:00.0'",
            "vm0.toml:2: ",
            &["must be a list such as [\"01:00.0", "not the text"],
        ),
        (
            "[readers]\nusers = 1001",
            "vm0.toml:3: ",
            &["must be a list such as [1001", "not the number 1001"],
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
            &["must be a table for each endpoint", "not the number 3"],
        ),
        ("reserved = 3", "vm0.toml:2: ", &["a list such as [{ first"]),
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
            &["0 is not a realtime priority", "1 to 99"],
        ),
        (
            "realtime-priority = 100",
            "vm0.toml:2: realtime-priority: ",
            &["100 is not a realtime priority", "1 to 99"],
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
            &["0xfee00000..=0xfeefffff:msi", "top of the file replaces it"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\n\
             reserved = [{ first = 0xfeef0000, last = 0xfeffffff }]",
            "vm0.toml:4: endpoint[0].reserved: ",
            &["overlap", "top of the file replaces it"],
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
            &["move it under the `[[endpoint]]`"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nvfio = '65:00'",
            "vm0.toml:4: endpoint[0].vfio: ",
            &["\"65:00\" is not a PCI address", "such as 0000:65:00.0"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nvfio = 65",
            "vm0.toml:4: endpoint[0].vfio: ",
            &["a PCI address of the host as a text"],
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
        // Shadow readers.
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
            &["more than one function", "may share one path"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nshadow = '/s'\nvfio = '65:00.0'",
            "vm0.toml:4: endpoint[0].shadow: ",
            &["two devices; remove"],
        ),
        (
            "[[endpoint]]\naddress = '00:10.0'\nshadow = '/s'\nvfio-user = { listen = '/l', connect = '/n' }",
            "vm0.toml:4: endpoint[0].shadow: ",
            &["two devices; remove"],
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
        for term in ["struct ", "Draft", "sequence", "invalid type"] {
            assert!(!message.contains(term), "{text}: {term:?} in {message}");
        }
    }
}

#[test]
fn the_address_of_the_iommu_is_required() {
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

    // An endless file is read only up to the limit.
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
    assert!(error.to_string().ends_with("and 299980 more problems"));
}
