//! Any bytes in the device-readable part of a request.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_device_iommu::protocol::request::{DecodeError, Request, RequestKind};

fuzz_target!(|bytes: &[u8]| {
    match Request::decode(bytes) {
        Ok(request) => assert_eq!(RequestKind::of(bytes), Some(request.kind())),
        Err(DecodeError::UnknownType) => assert_eq!(RequestKind::of(bytes), None),
        Err(DecodeError::TooShort { need, have, .. }) => {
            assert!(have < need && have == bytes.len());
        }
    }
});
