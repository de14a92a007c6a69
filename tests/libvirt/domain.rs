//! A domain of libvirt, made of what `libvirt-xml` prints.

use std::fs;
use std::path::{Path, PathBuf};

use crate::agent::Agent;
use crate::machine::{install_once, run, run_ok};

/// Where libvirt and its AppArmor profiles expect files for guests.
const IMAGES: &str = "/var/lib/libvirt/images";

/// Loads the profiles of libvirt, which this machine does not load at boot, and starts it with them.
pub fn confine_libvirt() {
    install_once();
    run_ok(&[
        "apparmor_parser",
        "-r",
        "/etc/apparmor.d/usr.sbin.libvirtd",
        "/etc/apparmor.d/usr.lib.libvirt.virt-aa-helper",
    ]);
    run_ok(&["systemctl", "restart", "libvirtd.service"]);
    let capabilities = run_ok(&["virsh", "capabilities"]);
    assert!(
        capabilities.contains("<model>apparmor</model>"),
        "{capabilities}"
    );
}

/// A domain. Drop ends and removes it.
pub struct Domain {
    name: &'static str,
    pub uuid: String,
    /// The agent of the running guest.
    pub guest: Agent,
}

impl Domain {
    /// Defines the domain of the VM that `file` describes, as `change` has changed what is printed.
    pub fn define(name: &'static str, file: &Path, change: impl FnOnce(String) -> String) -> Self {
        let file = file.to_str().expect("text");
        let printed = change(run_ok(&["vhost-device-iommu", "libvirt-xml", file]));
        let path = format!("/run/{name}.xml");
        fs::write(&path, Self::completed(name, &printed)).expect("written");
        for image in ["vmlinuz", "initramfs"] {
            fs::copy(format!("/host/{image}"), format!("{IMAGES}/{image}")).expect("copied");
        }
        run_ok(&["virsh", "define", "--validate", &path]);
        let uuid = run_ok(&["virsh", "domuuid", name]).trim().to_owned();
        Self {
            name,
            uuid,
            guest: Agent::default(),
        }
    }

    /// Adds what the operator would: here a kernel, two serial ports, and a processor.
    fn completed(name: &str, printed: &str) -> String {
        let kernel = format!(
            "<kernel>{IMAGES}/vmlinuz</kernel><initrd>{IMAGES}/initramfs</initrd>\
             <cmdline>console=ttyS0 panic=-1 quiet no_timer_check</cmdline></os>"
        );
        let serial = format!(
            "<serial type='file'><source path='/var/log/libvirt/qemu/{name}-console.log'/></serial>\
             <serial type='unix'><source mode='bind' path='{}'/></serial></devices>",
            Self::agent_socket(name).display()
        );
        let mut replaced = vec![("</os>", kernel.as_str()), ("</devices>", serial.as_str())];
        if Path::new("/dev/kvm").exists() {
            // The emulated machine's time stamp counter may never reach a deadline, and its SVM may deliver an interrupt twice.
            replaced.push((
                "</features>",
                "<apic eoi='off'/></features><cpu mode='host-passthrough'>\
                 <feature policy='disable' name='tsc-deadline'/></cpu>",
            ));
        } else {
            replaced.push(("type='kvm'", "type='qemu'"));
        }
        replaced
            .into_iter()
            .fold(printed.to_owned(), |text, (old, new)| {
                assert_eq!(text.matches(old).count(), 1, "{old} in {text}");
                text.replace(old, new)
            })
    }

    fn agent_socket(name: &str) -> PathBuf {
        format!("/run/{name}-agent.sock").into()
    }

    /// Starts the VM, and connects to its guest's serial port.
    pub fn start(&mut self) {
        let started = run(&["virsh", "start", self.name]);
        let log = format!("/var/log/libvirt/qemu/{}.log", self.name);
        let log = || fs::read_to_string(&log).unwrap_or_default();
        assert!(started.success, "{}\n{}", started.text, log());
        self.guest = Agent::connect(&Self::agent_socket(self.name));
    }

    /// The AppArmor profile of its QEMU.
    pub fn profile(&self) -> String {
        let pid = fs::read_to_string(format!("/run/libvirt/qemu/{}.pid", self.name));
        let pid = pid.expect("it runs");
        let profile = fs::read_to_string(format!("/proc/{}/attr/current", pid.trim()));
        profile.expect("a process").trim().to_owned()
    }

    /// Its XML now.
    pub fn xml(&self) -> String {
        run_ok(&["virsh", "dumpxml", self.name])
    }

    /// Runs `virsh attach-device` or `detach-device` for a device.
    pub fn change(&self, command: &str, xml: &str) {
        let path = format!("/run/{}-device.xml", self.name);
        fs::write(&path, xml).expect("written");
        run_ok(&["virsh", command, self.name, &path, "--live"]);
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        let console = format!("/var/log/libvirt/qemu/{}-console.log", self.name);
        eprintln!("{}", fs::read_to_string(console).unwrap_or_default());
        let units = [
            format!("vhost-device-iommu@{}", self.name),
            format!("vhost-device-iommu-adopt@{}*", self.name),
        ];
        let [daemon, helper] = units.each_ref();
        let journal = [
            "journalctl",
            "--no-pager",
            "-n",
            "60",
            "-u",
            daemon,
            "-u",
            helper,
        ];
        eprintln!("{}", run(&journal).text);
        run(&["virsh", "destroy", self.name]);
        run(&["virsh", "undefine", self.name]);
    }
}
