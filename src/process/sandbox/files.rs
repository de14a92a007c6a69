//! The Landlock rules: the daemon may remove its own sockets, and reaches nothing else in the file system.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use log::warn;

use super::SandboxError;
use super::role::{Needs, Plugging};

/// The newest Landlock version whose rights are used here. An older kernel uses those that it has.
const NEWEST: ABI = ABI::V6;

/// The rules for `needs`. A thread may remove sockets from their folders. It may not open, create or change a
/// file, use a TCP port, or connect to an abstract socket of another process. It may still use descriptors that
/// are open, and connect to sockets at paths.
///
/// # Errors
/// The kernel refuses. A kernel without Landlock is not an error.
pub(super) fn rules(needs: &Needs) -> Result<RulesetCreated, SandboxError> {
    with_sockets(needs, AccessFs::RemoveFile.into())
}

/// The rules for the thread `control` if it adds endpoints. To do so it opens the device and creates the sockets.
///
/// # Errors
/// As for [`rules`].
pub(super) fn control_rules(
    needs: &Needs,
    plugging: &Plugging,
) -> Result<RulesetCreated, SandboxError> {
    let Plugging {
        nodes,
        sysfs_folders,
        ..
    } = plugging;
    let mut rules = with_sockets(needs, AccessFs::RemoveFile | AccessFs::MakeSock)?;
    let node = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::ReadDir | AccessFs::IoctlDev;
    let folder = AccessFs::ReadFile | AccessFs::ReadDir;
    let nodes = nodes.iter().map(|path| (path, node));
    let folders = sysfs_folders.iter().map(|path| (path, folder));
    for (path, rights) in nodes.chain(folders) {
        rules = beneath(rules, path, rights)?;
    }
    Ok(rules)
}

/// The rules for the thread `metrics-file`, which writes a file into `folder` and renames it.
///
/// # Errors
/// As for [`rules`].
pub(super) fn textfile_rules(folder: &Path) -> Result<RulesetCreated, SandboxError> {
    let file = AccessFs::MakeReg | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::RemoveFile;
    beneath(without_files()?, folder, file)
}

/// Rules that allow nothing.
fn without_files() -> Result<RulesetCreated, SandboxError> {
    let rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    Ok(rules)
}

fn with_sockets(needs: &Needs, rights: BitFlags<AccessFs>) -> Result<RulesetCreated, SandboxError> {
    let mut rules = without_files()?;
    for folder in &needs.socket_folders {
        // Making the socket reports a folder that is missing, with the cure.
        if folder.is_dir() {
            rules = beneath(rules, folder, rights)?;
        }
    }
    Ok(rules)
}

/// Allows `rights` at `path` and below. Adds no rule if `path` cannot be opened.
fn beneath(
    rules: RulesetCreated,
    path: &Path,
    rights: BitFlags<AccessFs>,
) -> Result<RulesetCreated, SandboxError> {
    let Ok(opened) = PathFd::new(path) else {
        warn!(
            "{} cannot be opened, so the sandbox does not allow it; restart the daemon once it exists",
            path.display()
        );
        return Ok(rules);
    };
    // Rights of folders are not valid for a file.
    let rights = if path.is_dir() {
        rights
    } else {
        rights & AccessFs::from_file(NEWEST)
    };
    // The kernel refuses a rule without rights.
    if rights.is_empty() {
        return Ok(rules);
    }
    Ok(rules.add_rule(PathBeneath::new(opened, rights))?)
}

/// How far the kernel enforces the rules for files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRules {
    /// All of them.
    Enforced,
    /// Those that its version of Landlock has: opening, making and removing files are among them in every version.
    Partial,
    /// None: the kernel has no Landlock.
    Missing,
}

impl FileRules {
    /// The name in answers to the operator.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enforced => "enforced",
            Self::Partial => "partial",
            Self::Missing => "missing",
        }
    }
}

/// Puts the calling thread and the threads that it starts under the rules.
///
/// # Errors
/// The kernel refuses, for example because the thread has 16 layers of rules already.
pub(super) fn restrict(rules: RulesetCreated) -> Result<FileRules, SandboxError> {
    Ok(match rules.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => FileRules::Enforced,
        RulesetStatus::PartiallyEnforced => FileRules::Partial,
        RulesetStatus::NotEnforced => FileRules::Missing,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io;
    use std::net::TcpListener;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    use super::*;

    fn is_refused<T>(tried: io::Result<T>) -> bool {
        tried.is_err_and(|cause| {
            matches!(
                cause.raw_os_error(),
                Some(libc::EACCES | libc::EPERM | libc::EXDEV)
            )
        })
    }

    /// A folder with these folders, each with a file.
    fn folders(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for name in names {
            let inner = folder.path().join(name);
            fs::create_dir(&inner).expect("a folder");
            fs::write(inner.join("file"), "text").expect("a file");
        }
        folder
    }

    #[test]
    fn control_reaches_devices_and_sockets() {
        let folder = folders(&["dev", "sys", "run", "metrics", "other"]);
        let at = |name: &str| folder.path().join(name);
        let plugging = Plugging {
            nodes: vec![at("dev"), at("missing")],
            sysfs_folders: vec![at("sys")],
            ..Plugging::default()
        };
        let needs = Needs {
            textfile_folder: Some(at("metrics")),
            socket_folders: vec![at("run")],
            ..Needs::default()
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let rules = control_rules(&needs, &plugging).expect("rules");
                if restrict(rules).expect("restricted") == FileRules::Missing {
                    return;
                }
                let file = |name: &str| at(name).join("file");
                let mut open = fs::OpenOptions::new();
                open.read(true).write(true);
                open.open(file("dev")).expect("a device");
                fs::read(file("sys")).expect("a fact");
                assert!(is_refused(fs::write(file("sys"), "")));
                UnixListener::bind(at("run").join("socket")).expect("a socket");
                assert!(is_refused(fs::write(file("metrics"), "figures")));
                assert!(is_refused(fs::read(file("run"))));
                assert!(is_refused(fs::read(file("other"))));
                assert!(is_refused(UnixListener::bind(at("other").join("socket"))));
            });
        });
    }

    #[test]
    fn the_metrics_thread_reaches_its_folder() {
        let folder = folders(&["metrics", "run"]);
        let at = |name: &str| folder.path().join(name);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let rules = textfile_rules(&at("metrics")).expect("rules");
                if restrict(rules).expect("restricted") == FileRules::Missing {
                    return;
                }
                let file = |name: &str| at(name).join("file");
                fs::write(file("metrics"), "figures").expect("metrics");
                fs::rename(file("metrics"), at("metrics").join("new")).expect("the same folder");
                assert!(is_refused(fs::read(at("metrics").join("new"))));
                fs::remove_file(at("metrics").join("new")).expect("its own");
                assert!(is_refused(fs::read(file("run"))));
                assert!(is_refused(fs::write(file("run"), "")));
                assert!(is_refused(fs::remove_file(file("run"))));
                assert!(is_refused(UnixListener::bind(at("metrics").join("s"))));
            });
        });
    }

    /// In a thread of its own, so that the test program is not restricted.
    #[test]
    fn a_thread_may_only_remove_sockets() {
        let own = tempfile::tempdir().expect("a folder");
        let other = tempfile::tempdir().expect("a folder");
        let needs = Needs {
            // A file in place of a folder, too.
            socket_folders: vec![
                own.path().to_owned(),
                other.path().join("missing"),
                other.path().join("file"),
            ],
            ..Needs::default()
        };
        for folder in [&own, &other] {
            fs::write(folder.path().join("file"), "text").expect("a file");
        }
        let socket = UnixListener::bind(other.path().join("socket")).expect("a socket");
        let name = format!("viommu-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(name).expect("a name");
        let elsewhere = UnixListener::bind_addr(&abstract_name).expect("a socket");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                control_rules(&needs, &Plugging::default()).expect("rules for control");
                textfile_rules(&other.path().join("file")).expect("rules for metrics");
                let rules = rules(&needs).expect("rules");
                let status = rules.restrict_self().expect("restricted").ruleset;
                if status == RulesetStatus::NotEnforced {
                    return;
                }
                for folder in [&own, &other] {
                    let file = folder.path().join("file");
                    assert!(is_refused(fs::read(&file)));
                    assert!(is_refused(fs::write(&file, "")));
                    assert!(is_refused(fs::write(folder.path().join("new"), "")));
                    assert!(is_refused(UnixListener::bind(folder.path().join("s"))));
                    assert!(is_refused(fs::read_dir(folder.path())));
                }
                assert!(is_refused(fs::remove_file(other.path().join("file"))));
                fs::remove_file(own.path().join("file")).expect("of its own sockets' folder");
                // The daemon can still connect to an emulated device's server.
                UnixStream::connect(other.path().join("socket")).expect("connected");
                // Rights that not every version of Landlock has.
                if status == RulesetStatus::FullyEnforced {
                    assert!(is_refused(TcpListener::bind("127.0.0.1:0")));
                    assert!(is_refused(UnixStream::connect_addr(&abstract_name)));
                }
            });
        });
        drop((socket, elsewhere));
        fs::read(other.path().join("file")).expect("other threads are as before");
    }
}
