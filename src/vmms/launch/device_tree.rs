//! The device tree that QEMU makes for a VM, before the IOMMU is added to it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use thiserror::Error;

use crate::config::Config;
use crate::qemu::args::{TreeSource, dump_arguments};
use crate::topology::device_tree::MAX_TREE;

/// The most bytes of QEMU's messages in an error.
const MAX_MESSAGE: usize = 2048;

/// The VMM's device tree cannot be had.
#[derive(Debug, Error)]
pub enum BaseTreeError {
    /// QEMU cannot be started.
    #[error(
        "cannot start {program} to get its device tree: {source}; give a program that can be run, or its path"
    )]
    Start {
        /// The program.
        program: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// QEMU has written no tree.
    #[error(
        "{program} wrote no device tree ({status}): {message}; mend the -machine, -cpu, -smp, -m and -object options \
         that it names, or give a tree with -dtb"
    )]
    NoTree {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// Its messages.
        message: String,
    },
    /// The tree cannot be read.
    #[error("cannot read the device tree {path}: {source}; give one that can be read with -dtb")]
    Read {
        /// The path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The folder for QEMU's file cannot be made.
    #[error("cannot make a folder for the device tree: {0}; set TMPDIR to a folder with room")]
    Folder(#[source] io::Error),
}

/// The device tree of a VM: the operator's, or that of `program` with the operator's arguments `others`.
pub(super) fn base(
    config: &Config,
    program: &OsStr,
    others: &[OsString],
) -> Result<Vec<u8>, BaseTreeError> {
    let (wrapped, own) = split_wrapper(program, others);
    let of_machine = match TreeSource::new(own) {
        TreeSource::File(path) => return read_tree(&path),
        TreeSource::Qemu(arguments) => arguments,
    };
    let folder = tempfile::tempdir().map_err(BaseTreeError::Folder)?;
    let path = folder.path().join("tree");
    let mut command = Command::new(program);
    command.args(wrapped);
    // QEMU takes the last of several types, so the operator's counts.
    command.args([
        "-machine",
        &format!("{},gic-version=3", config.machine.name()),
    ]);
    command.args(of_machine);
    command.args(dump_arguments(&path));
    command.stdin(Stdio::null());
    let program = || PathBuf::from(program);
    let ended = command.output().map_err(|source| BaseTreeError::Start {
        program: program(),
        source,
    })?;
    if !ended.status.success() || !path.exists() {
        let message = String::from_utf8_lossy(&ended.stderr);
        return Err(BaseTreeError::NoTree {
            program: program(),
            status: ended.status,
            message: message.trim().chars().take(MAX_MESSAGE).collect(),
        });
    }
    read_tree(&path)
}

/// The arguments of a wrapper with the name of QEMU's program as the last, and QEMU's own. The first is empty if
/// `program` is QEMU, or is not known to be another.
fn split_wrapper<'a>(program: &OsStr, others: &'a [OsString]) -> (&'a [OsString], &'a [OsString]) {
    let is_qemu = |word: &OsStr| {
        let name = Path::new(word).file_name().unwrap_or_default();
        name.as_bytes().starts_with(b"qemu-system-")
    };
    let found = others.iter().position(|word| is_qemu(word));
    let own = found.filter(|_| !is_qemu(program)).map_or(0, |at| at + 1);
    others.split_at(own)
}

/// The device tree at `path`: at most one byte more than a tree may have, so that a longer one is refused as cut off.
///
/// # Errors
/// It cannot be read.
pub fn read_tree(path: &Path) -> Result<Vec<u8>, BaseTreeError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_TREE + 1).read_to_end(&mut bytes))
        .map_err(|source| BaseTreeError::Read {
            path: path.to_owned(),
            source,
        })?;
    Ok(bytes)
}
