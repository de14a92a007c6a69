//! What the kernel, or its double, refuses.

use super::*;

#[test]
#[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
fn an_exported_device_whose_dma_may_pass_the_caches_by_is_refused() {
    let check = |keys: &str, is_enforced: bool| {
        let text = format!(
            "socket = '/s'\naddress = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\n{keys}"
        );
        let config = crate::config::Config::from_text(std::path::Path::new("vm.toml"), &text);
        let config = config.expect("a configuration");
        let device = config.devices.passthrough[0];
        super::super::check_coherency(&config, device, is_enforced)
            .map_err(|refusal| refusal.to_string())
    };
    let export = "export = '/e'";
    let refusal = check(export, false).expect_err("no snoop control");
    for part in [
        "0000:65:00.0",
        "00:06.0",
        "KVM",
        "remove `export`",
        "allow-no-snoop = true",
    ] {
        assert!(refusal.contains(part), "{refusal}");
    }
    assert_eq!(check(export, true), Ok(()));
    assert_eq!(check("", false), Ok(()), "the VMM tells KVM");
    let given = |value: bool| format!("{export}\nallow-no-snoop = {value}");
    assert!(check(&given(false), false).is_err());
    assert_eq!(check(&given(true), false), Ok(()));
}

/// The fake kernel refuses what the real one refuses.
#[test]
fn the_fake_kernel_is_as_strict_as_linux() {
    let ram = slot(0, 0x4000, 0);
    let errno = |result: std::io::Result<u64>| result.err().and_then(|e| e.raw_os_error());
    let rw = Access::READ_WRITE;

    let (container, _) = FakeKernel::default().container();
    let map = |first, last, access, at| {
        let done = container.map(range(first, last), access, &ram.memory, at);
        errno(done.map(|()| 0))
    };
    assert_eq!(map(0x1000, 0x2fff, rw, 0), None);
    assert_eq!(map(0x2000, 0x2fff, rw, 0), Some(libc::EEXIST));
    assert_eq!(map(0x4800, 0x57ff, rw, 0), Some(libc::EINVAL));
    assert_eq!(map(0x4000, 0x47ff, rw, 0), Some(libc::EINVAL));
    assert_eq!(map(0x4000, 0x4fff, rw, 0x800), Some(libc::EINVAL));
    assert_eq!(map(0x4000, 0x4fff, Access::NONE, 0), Some(libc::EINVAL));
    let unmap = |first, last| errno(container.unmap(range(first, last)));
    assert_eq!(unmap(0x1000, 0x1fff), Some(libc::EINVAL), "splits");
    assert_eq!(unmap(0xfff, 0x2fff), Some(libc::EINVAL), "misaligned");
    assert_eq!(unmap(0x1000, 0x3000), Some(libc::EINVAL), "misaligned");
    assert_eq!(unmap(0x8000, 0x8fff), None, "nothing there");
    assert_eq!(container.unmap(range(0, 0xffff)).expect("unmapped"), 0x2000);

    let kernel = FakeKernel::default();
    let (device, _) = kernel.vmm_device(1, 1);
    let ioas = kernel.alloc().expect("an address space");
    let map = |first, last, access, at| {
        let source = crate::vfio::DmaSource::Host(&ram.memory, at);
        errno(
            kernel
                .map(ioas, range(first, last), access, source)
                .map(|()| 0),
        )
    };
    // Without a device an address space has no alignment.
    assert_eq!(map(0x4800, 0x4fff, rw, 0x800), None);
    let attached = device.attach(ioas).map(|()| 0);
    assert_eq!(errno(attached), Some(libc::EADDRINUSE));
    kernel.unmap(ioas, range(0x4000, 0x4fff)).expect("unmapped");
    device.attach(ioas).expect("attached");
    assert_eq!(map(0x4800, 0x4fff, rw, 0x800), Some(libc::EINVAL));
    assert_eq!(map(0x4000, 0x4fff, Access::NONE, 0), Some(libc::EINVAL));
    assert_eq!(map(0x1000, 0x1fff, rw, 0), None);
    assert_eq!(map(0x2000, 0x3fff, rw, 0), None);
    assert_eq!(map(0x3000, 0x4fff, rw, 0), Some(libc::EEXIST));
    let unmap = |first, last| errno(kernel.unmap(ioas, range(first, last)));
    assert_eq!(unmap(0x8000, 0x8fff), Some(libc::ENOENT), "nothing there");
    assert_eq!(unmap(0, 0x2fff), Some(libc::ENOENT), "splits the second");
    assert_eq!(kernel.state().spaces[&ioas].len(), 1, "the first is gone");
    assert_eq!(unmap(1, 0x4ffe), None, "any range");
}
