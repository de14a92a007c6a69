//! The figures that an operator sees of an exported device.

use serde_json::json;
use vhost_device_iommu::args::Question;
use vhost_device_iommu::ctl;

use crate::bed::{Bed, eventually};

#[test]
fn clients_and_cut_offs_are_counted() {
    let bed = Bed::new();
    let state = bed.server.as_ref().expect("it runs").status();
    let figures = || {
        let counts = (state.clients.get(), state.cut_offs.get());
        (state.is_connected(), counts)
    };
    assert_eq!(figures(), (false, (0, 0)));
    let client = bed.client();
    assert_eq!(figures(), (true, (1, 0)));
    drop(client);
    eventually("the client's end", || !figures().0);
    assert_eq!(figures(), (false, (1, 0)));
    let mut hostile = bed.client();
    hostile.send_raw(&[0xff; 40], &[]);
    assert!(hostile.is_closed());
    eventually("the client's end", || !figures().0);
    assert_eq!(figures(), (false, (2, 1)));
}

#[test]
fn the_status_shows_exported_devices() {
    let status = json!({
        "name": "vm1", "connected": true, "endpoint_count": 1,
        "endpoints": [{ "address": "0000:00:06.0", "state": "attached", "dma": "translated",
            "domain": 3, "host": "0000:65:00.0", "exported": true, "emulated": false }],
        "exports": [{ "address": "0000:00:06.0", "client": true, "clients": 2, "cut_offs": 1 }],
    });
    let text = ctl::render(&Question::Status, &status);
    for line in [
        "  0000:00:06.0  attached    translated domain 3  host device 0000:65:00.0, exported",
        "  0000:00:06.0  exported: a client is connected; 2 clients so far, 1 cut off",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in {text}");
    }
}

/// The host's IOMMU decides whether a mapping for writes only can be read.
#[test]
fn the_status_names_the_hosts_iommu() {
    let endpoint = |write_only: &str| {
        json!({ "endpoints": [{ "address": "0000:00:06.0", "state": "attached", "dma": "translated",
            "domain": 3, "host": "0000:65:00.0", "exported": false, "emulated": false,
            "host_iommu": { "name": "smmu3.0x0000000009050000", "architecture": "smmu-v3", "write_only": write_only } }] })
    };
    for (write_only, end) in [
        ("readable", ", which lets it read write-only mappings"),
        ("unknown", ", which may let it read write-only mappings"),
        ("enforced", ""),
    ] {
        let text = ctl::render(&Question::Endpoints, &endpoint(write_only));
        let expected =
            format!("domain 3  host device 0000:65:00.0 behind smmu3.0x0000000009050000{end}\n");
        assert!(text.ends_with(&expected), "{text}");
    }
}
