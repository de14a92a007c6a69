//! Any text as a configuration file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use vhost_device_iommu::config::Config;
use vhost_device_iommu::topology::viot;

fuzz_target!(|text: &str| {
    match Config::from_text(Path::new("vm.toml"), text) {
        Ok(config) => {
            let table = viot::table(&config.topology);
            if let Ok(table) = table {
                let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                assert_eq!(sum, 0, "the checksum");
            }
        }
        Err(error) => assert!(error.to_string().contains("vm.toml")),
    }
});
