//! The build options and the page size of the host's kernel.

use std::fs::File;
use std::io::Read;

use flate2::read::GzDecoder;

use crate::host::sysfs::HostRoot;

/// The most bytes of a kernel's configuration. Those of distributions have a third of a MiB.
const MAX_CONFIG: u64 = 4 << 20;
/// The type of the entry with the page size in a process's auxiliary vector.
const AT_PAGESZ: u64 = 6;

/// The options that the host's kernel was built with.
pub(super) struct KernelOptions {
    release: String,
    text: String,
}

impl KernelOptions {
    /// The options of the kernel of the host below `root`; `None` if no file has them. The kernel itself tells them in
    /// `/proc/config.gz` (`CONFIG_IKCONFIG_PROC`). Debian has them in `/boot`, Fedora below `/lib/modules`.
    pub fn read(root: &HostRoot) -> Option<Self> {
        let release = root.value("proc/sys/kernel/osrelease")?;
        let files = [
            format!("boot/config-{release}"),
            format!("lib/modules/{release}/config"),
        ];
        let mut texts = files
            .iter()
            .filter_map(|file| root.text_up_to(file, MAX_CONFIG).ok());
        let text = own_options(root).or_else(|| texts.next())?;
        Some(Self { release, text })
    }

    /// Whether the kernel was built without `option`, such as `CONFIG_IOMMUFD`.
    pub fn lacks(&self, option: &str) -> bool {
        let is_set = |line: &str| {
            let value = line
                .strip_prefix(option)
                .and_then(|it| it.strip_prefix('='));
            matches!(value.map(str::trim_end), Some("y" | "m"))
        };
        // A file without any option is none of a kernel.
        self.text.contains("\nCONFIG_") && !self.text.lines().any(is_set)
    }

    /// The kernel's release.
    pub fn release(&self) -> &str {
        &self.release
    }
}

/// The first two numbers of the running kernel's release; `None` if it cannot be read.
pub(super) fn version(root: &HostRoot) -> Option<(u32, u32)> {
    let release = root.value("proc/sys/kernel/osrelease")?;
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether the kernel is locked down (`integrity` or `confidentiality`), as with Secure Boot: it then loads only signed
/// modules. `false` if the kernel does not tell.
fn is_locked_down(root: &HostRoot) -> bool {
    // All levels, with the one in force in brackets.
    let levels = root.value("sys/kernel/security/lockdown");
    levels.is_some_and(|levels| levels.contains('[') && !levels.contains("[none]"))
}

/// What to say after the name of a module that is to be loaded if `path` does not exist.
pub(super) fn signed_clause(root: &HostRoot, path: &str) -> &'static str {
    if is_locked_down(root) && !root.path(path).exists() {
        "; this kernel is locked down (Secure Boot) and takes only modules that are signed for it, such as the distribution's"
    } else {
        ""
    }
}

/// The options that the running kernel tells, compressed.
fn own_options(root: &HostRoot) -> Option<String> {
    let file = File::open(root.path("proc/config.gz")).ok()?;
    let mut text = String::new();
    let mut limited = GzDecoder::new(file.take(MAX_CONFIG)).take(MAX_CONFIG);
    limited.read_to_string(&mut text).ok()?;
    Some(text)
}

/// If the kernel was built without `option`: a clause that says so.
pub(super) fn lacking(root: &HostRoot, option: &str) -> Option<String> {
    let options = KernelOptions::read(root)?;
    let release = options.release();
    let clause = || format!("this kernel ({release}) was built without {option}");
    options.lacks(option).then(clause)
}

/// The size of the kernel's pages in bytes; `None` if it cannot be read.
pub(super) fn page_size(root: &HostRoot) -> Option<u64> {
    let vector = root.bytes("proc/self/auxv").ok()?;
    let (words, _) = vector.as_chunks::<8>();
    let (entries, _) = words.as_chunks::<2>();
    let mut entries = entries
        .iter()
        .map(|[key, value]| (u64::from_ne_bytes(*key), u64::from_ne_bytes(*value)));
    let size = entries.find(|(key, _)| *key == AT_PAGESZ)?.1;
    size.is_power_of_two().then_some(size)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;
    use crate::host::sysfs::fake::FakeHost;

    #[test]
    fn options_are_read_from_the_running_kernels_file() {
        let host = FakeHost::new();
        assert_eq!(lacking(&host.root(), "CONFIG_IOMMUFD"), None);
        host.file("proc/sys/kernel/osrelease", "6.12.117+deb13-arm64\n");
        assert_eq!(lacking(&host.root(), "CONFIG_IOMMUFD"), None);
        let file = "boot/config-6.12.117+deb13-arm64";
        host.file(
            file,
            "# Linux/arm64\nCONFIG_VFIO=m\nCONFIG_IOMMUFD_DRIVER=y\n# CONFIG_IOMMUFD is not set\nCONFIG_PCI=y\n",
        );
        let text = lacking(&host.root(), "CONFIG_IOMMUFD").expect("it is off");
        assert_eq!(
            text,
            "this kernel (6.12.117+deb13-arm64) was built without CONFIG_IOMMUFD"
        );
        for option in ["CONFIG_VFIO", "CONFIG_PCI"] {
            assert_eq!(lacking(&host.root(), option), None, "{option}");
        }
        host.file(file, "garbage");
        assert_eq!(lacking(&host.root(), "CONFIG_IOMMUFD"), None);
    }

    /// What the kernel itself tells comes before a file that a distribution has installed.
    #[test]
    fn options_are_read_wherever_a_distribution_has_them() {
        let lacks = |host: &FakeHost| lacking(&host.root(), "CONFIG_IOMMUFD").is_some();
        let host = FakeHost::new();
        host.file("proc/sys/kernel/osrelease", "6.17.1-300.fc43.x86_64\n");
        host.file(
            "lib/modules/6.17.1-300.fc43.x86_64/config",
            "#\nCONFIG_VFIO=m\n",
        );
        assert!(lacks(&host));
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(b"#\nCONFIG_IOMMUFD=m\n").expect("memory");
        let packed = packed.finish().expect("memory");
        host.file("proc/config.gz", packed.clone());
        assert!(!lacks(&host));
        for damaged in [&packed[..packed.len() / 2], &b"\x1f\x8b"[..], b""] {
            host.file("proc/config.gz", damaged);
            assert!(lacks(&host), "the file of the distribution counts");
        }
        // As much as a kernel never tells.
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        let line = b"CONFIG_IOMMUFD=m\n".repeat(1 << 16);
        (0..64).for_each(|_| packed.write_all(&line).expect("memory"));
        host.file("proc/config.gz", packed.finish().expect("memory"));
        assert!(!lacks(&host));
    }

    #[test]
    fn the_page_size_is_read_from_the_auxiliary_vector() {
        assert_eq!(page_size(&FakeHost::new().root()), None);
        let host = FakeHost::with_pages(65536);
        assert_eq!(page_size(&host.root()), Some(65536));
        assert!(page_size(&HostRoot::default()).is_some_and(|size| size >= 4096));
    }
}
