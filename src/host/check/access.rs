//! Checks whether this process may open a device node, without opening it, and says how it may.
#![expect(
    unsafe_code,
    reason = "asks the kernel by faccessat, which std does not offer"
)]

use std::ffi::CString;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::Finding;
use crate::host::sysfs::HostRoot;

/// Checks that this process may open `path` for reading and writing: by mode, access lists and
/// capabilities.
///
/// # Errors
///
/// The path or the access rights do not allow it: for example `NotFound` or `PermissionDenied`. After `Ok`, the
/// device filter of a container may still refuse to open the file.
pub(super) fn read_write(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY:
    // - path: a string with a final zero that lives through the call; the kernel only reads it
    // - no other memory is passed
    let done = unsafe {
        libc::faccessat(
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::R_OK | libc::W_OK,
            libc::AT_EACCESS,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The finding if this process cannot open the node `below`, which `udev_match` matches in a udev rule.
pub(super) fn node_finding(root: &HostRoot, below: &str, udev_match: &str) -> Option<Finding> {
    let cause = read_write(&root.path(below)).err()?;
    Some(if cause.kind() == ErrorKind::NotFound {
        Finding::missing(
            format!("there is no /{below}"),
            "let udev make the node; if the daemon runs in a container, give the node to the container",
        )
    } else {
        Finding::missing(
            format!("/{below} cannot be opened for reading and writing: {cause}"),
            format!(
                "give it to a group of the daemon's user, here kvm; permanently with the udev rule \
                 {udev_match}, GROUP=\"kvm\", MODE=\"0660\""
            ),
        )
        .with_commands(vec![
            format!("chgrp kvm /{below}"),
            format!("chmod 660 /{below}"),
        ])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn missing_files_are_distinguished_from_accessible_ones() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("node");
        let kind = |path: &Path| read_write(path).expect_err("refused").kind();
        assert_eq!(kind(&file), ErrorKind::NotFound);
        fs::write(&file, "").expect("written");
        read_write(&file).expect("it may be opened");
        assert_eq!(kind(&file.join("below")), ErrorKind::NotADirectory);
        // Root may write a read-only file, so the result is compared with that of opening it.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).expect("changed");
        let opened = File::options().read(true).write(true).open(&file);
        assert_eq!(read_write(&file).is_ok(), opened.is_ok());
    }
}
