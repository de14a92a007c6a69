//! Devices behind endpoints, and the descriptors that are inherited for them.

use std::collections::BTreeMap;
use std::io::Write;

use super::{GOOD, flags, parse};
use crate::args::DescriptorArgs;
use crate::config::{
    Config, ConfigError, Descriptors, HostIommu, Passthrough, Pin, ShadowListener,
};

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

fn passthrough(endpoint: &str, host: &str) -> Passthrough {
    Passthrough {
        endpoint: endpoint.parse().expect("an address"),
        host: host.parse().expect("an address"),
        token: None,
    }
}

const TOKEN: &str = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";

/// A token reaches the device, and neither a message nor a summary.
#[test]
fn a_vf_token_is_read_and_never_shown() {
    let parse = |line: &str| {
        let text = format!(
            "socket = '/s'\naddress = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '65:10.0'\nexport = '/e'\n{line}"
        );
        Config::from_text(std::path::Path::new("vm.toml"), &text)
    };
    let without = parse("").expect("a configuration");
    assert_eq!(without.devices.passthrough[0].token, None);
    for token in [TOKEN.to_owned(), TOKEN.to_uppercase()] {
        let config = parse(&format!("vf-token = '{token}'")).expect("a configuration");
        let read = config.devices.passthrough[0].token.expect("a token");
        assert_eq!(read.to_secret_text(), TOKEN);
        assert_eq!(read.as_bytes()[..2], [0xbd, 0x8d]);
        let shown = format!("{}{config:?}", config.summary());
        assert!(
            shown.contains("vfio 0000:65:10.0 with a VF token"),
            "{shown}"
        );
        assert!(!shown.to_lowercase().contains(&TOKEN[..8]), "{shown}");
        let keys =
            format!("address = '00:07.0', vfio = '65:10.1', export = '/f', vf-token = '{token}'");
        let refused = without.with_endpoint(&keys).expect_err("refused");
        let message = refused.to_string();
        assert!(message.contains("into the file"), "{message}");
        assert!(!message.to_lowercase().contains(&TOKEN[..8]), "{message}");
    }
    for (line, part) in [
        (format!("vf-token = '{TOKEN}0'"), "is no UUID"),
        (format!("vf-token = '{}g'", &TOKEN[..35]), "is no UUID"),
        (format!("vf-token = '{}-'", &TOKEN[..35]), "is no UUID"),
        (
            format!("vf-token = '{}'", TOKEN.replace('-', "0")),
            "is no UUID",
        ),
        ("vf-token = 7".to_owned(), "a UUID as a text"),
        (format!("vf-token = {TOKEN}"), "correct the TOML"),
        (format!("vf-tokn = '{TOKEN}'"), "unknown key `vf-tokn`"),
        (format!("colour = '{TOKEN}'"), "unknown key `colour`"),
        // One digit is missing or wrong, under a mistyped key.
        (
            format!("colour = '{}o{}'", &TOKEN[..17], &TOKEN[18..]),
            "unknown key `colour`",
        ),
        (
            format!("colour = '{}'", &TOKEN[..35]),
            "unknown key `colour`",
        ),
    ] {
        let message = parse(&line).expect_err(&line).to_string();
        assert!(message.contains(part), "{message}");
        assert!(!message.contains(&TOKEN[..8]), "{message}");
    }
}

/// The configuration of the options `line` and the file `DEVICES` with `key` at its top.
fn devices(key: &str, line: &str) -> Result<Config, ConfigError> {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    write!(file, "{key}\n{DEVICES}").expect("written");
    let path = file.path().display();
    flags(&format!("--config {path} --fd 3 {line}"))
}

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
    assert_eq!(
        config.devices.shadow,
        [listener("00:10.0"), listener("00:11.0")]
    );
    let summary = config.summary().to_string();
    assert!(summary.contains("0000:00:11.0 shadow /a\n"), "{summary}");
}

#[test]
fn devices_of_the_host_are_endpoints() {
    let config = parse(DEVICES).expect("good");
    let known = [
        passthrough("00:10.0", "0001:65:00.0"),
        passthrough("00:11.0", "66:00.1"),
    ];
    assert_eq!(config.devices.passthrough, known);
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
    assert!(
        config.devices.passthrough.is_empty(),
        "the file's are replaced"
    );
}

#[test]
fn descriptors_are_assigned_to_endpoints() {
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
fn unusable_descriptors_are_refused() {
    let iommufd = "host-iommu = 'iommufd'";
    let type1 = "host-iommu = 'type1'";
    for (key, line, place, cure) in [
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 00:10.0",
            "--vfio-fd: \"00:10.0\" is not a descriptor",
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
            "--vfio-fd: 0000:00:12.0 is not an endpoint with `vfio`",
            "give the endpoint's address in the guest",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 65:00.0=8",
            "--vfio-fd: 0000:65:00.0 is not an endpoint with `vfio`",
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
            "only once",
        ),
        (
            iommufd,
            "--iommufd-fd 3",
            "--iommufd-fd: descriptor 3 is given by --fd already",
            "only once",
        ),
        (
            iommufd,
            "--ready-fd 4 --iommufd-fd 4",
            "--iommufd-fd: descriptor 4 is given by --ready-fd already",
            "only once",
        ),
        (
            iommufd,
            "--iommufd-fd 7 --vfio-fd 00:10.0=7",
            "--vfio-fd: descriptor 7 is given by --iommufd-fd already",
            "only once",
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
            "--vfio-container-fd: a container is not used",
            "`host-iommu = \"type1\"`",
        ),
        (
            type1,
            "--iommufd-fd 7",
            "--iommufd-fd: an iommufd is not used",
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
            "--vfio-container-fd: 0000:00:12.0 is not an endpoint with `vfio`",
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
