//! The protection of a process by its sandbox, as the operator reads it.

use super::files::FileRules;

/// The protection of this process by its sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protection {
    /// How far the kernel enforces the rules for files.
    pub files: FileRules,
    /// The filter of the thread `control` allows opening files (`hotplug`).
    pub(super) control_opens_files: bool,
    /// The filter of the thread `metrics-file` allows opening files (`metrics.textfile`).
    pub(super) writes_metrics: bool,
}

impl Protection {
    /// The protection of files, as a part of a sentence.
    pub(super) fn summary(self) -> &'static str {
        match (self.files, self.control_opens_files, self.writes_metrics) {
            (FileRules::Missing, true, _) => {
                "NOT protected from the thread `control`, as this kernel has no Landlock"
            }
            (FileRules::Missing, false, true) => {
                "protected by the filters alone, except from the thread `metrics-file`, as this kernel has no Landlock"
            }
            (FileRules::Missing, false, false) => {
                "protected by the filters alone, as this kernel has no Landlock"
            }
            (_, false, false) => "out of reach",
            (_, true, false) => "out of reach, except those of `hotplug`",
            (_, false, true) => "out of reach, except the one of `metrics.textfile`",
            (_, true, true) => "out of reach, except those of `hotplug` and `metrics.textfile`",
        }
    }

    /// The threads that reach files because Landlock is missing, each as a sentence. Empty with Landlock.
    pub fn absent(self) -> Vec<&'static str> {
        if self.files != FileRules::Missing {
            return Vec::new();
        }
        let mut absent = Vec::new();
        if self.control_opens_files {
            absent.push(
                "the thread `control`, which reads what clients send, can open every file that the daemon's user can, \
                 as `hotplug` needs files",
            );
        }
        if self.writes_metrics {
            absent.push(
                "the thread `metrics-file`, which reads nothing that a peer sends, can open every file that the \
                 daemon's user can, as `metrics.textfile` needs a file",
            );
        }
        absent.push("the main thread and the thread `signals` can remove files outside the sockets' folders");
        absent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_promises_protection_that_only_landlock_gives() {
        for (control_opens_files, writes_metrics) in
            [(false, false), (true, false), (false, true), (true, true)]
        {
            let with = |files| Protection {
                files,
                control_opens_files,
                writes_metrics,
            };
            for there in [FileRules::Enforced, FileRules::Partial] {
                assert!(with(there).summary().contains("out of reach"));
                assert!(with(there).absent().is_empty());
            }
            let missing = with(FileRules::Missing);
            assert!(missing.summary().contains("no Landlock"));
            assert!(!missing.summary().contains("out of reach"));
            assert_eq!(missing.summary().contains("NOT"), control_opens_files);
            let absent = missing.absent().join("; ");
            assert_eq!(absent.contains("`control`"), control_opens_files);
            assert_eq!(absent.contains("`metrics-file`"), writes_metrics);
            assert!(absent.contains("`signals`"));
        }
    }
}
