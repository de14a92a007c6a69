//! The program as an operator or a VM manager runs it.

// `expect` in the helpers fails the test, too, but the lint allows it only in the test functions themselves.
#![allow(clippy::expect_used)]

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use clap::CommandFactory;
use tempfile::TempDir;
use vhost_device_iommu::args::Args;

const GOOD: &str = r#"
socket = "/run/vm0/iommu.sock"
memory = "2G"
address = "00:05.0"

[[endpoint]]
range = "00:10.0-00:1e.7"
group = "cards"
"#;

#[test]
fn capabilities_are_printed_despite_other_options() {
    for args in [
        &["--print-capabilities"][..],
        &["--config", "/nonexistent", "--print-capabilities"],
        &["--no-such-option", "--print-capabilities", "stray"],
        &["check", "--print-capabilities"],
        &["--fd", "1", "--socket-path", "x", "--print-capabilities"],
    ] {
        let run = run(args);
        assert_eq!(run.status, Some(0), "{args:?}: {}", run.stderr);
        let json: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
        assert_eq!(json, serde_json::json!({ "type": "iommu", "features": [] }));
        assert_eq!(run.stderr, "");
    }
    let run = run(&["check", "--", "--print-capabilities"]);
    assert_eq!(run.status, Some(1), "the name of a file after --");
}

#[test]
fn check_prints_a_summary_of_the_file() {
    let dir = files(&[("vm0.toml", GOOD)]);
    let run = run(&[OsStr::new("check"), dir.path().join("vm0.toml").as_ref()]);
    assert_eq!((run.status, run.stderr.as_str()), (Some(0), ""));
    for part in [
        "/run/vm0/iommu.sock",
        "IOMMU address:    0000:00:05.0",
        "48 bits",
        "4 KiB 2 MiB 1 GiB",
        "0xfee00000..=0xfeefffff:msi",
        "endpoints:        120",
        "0000:00:10.0-0000:00:1e.7 group cards",
        "page-table arena: up to 72 MiB",
        "kept state:       outlives the daemon if systemd (254 or later) or `launch` starts it",
    ] {
        assert!(run.stdout.contains(part), "{part} in\n{}", run.stdout);
    }
}

#[test]
fn check_refuses_with_file_line_key_and_cure() {
    let bad = GOOD.replace("00:10.0", "00:00.0");
    let dir = files(&[("vm0.toml", &bad)]);
    let file = dir.path().join("vm0.toml");
    let run = run(&[OsStr::new("check"), file.as_ref()]);
    assert_eq!((run.status, run.stdout.as_str()), (Some(1), ""));
    let place = format!("{}:7: endpoint[0].range: ", file.display());
    assert!(run.stderr.contains(&place), "{}", run.stderr);
    assert!(run.stderr.contains("split the range"), "{}", run.stderr);
}

/// The last PCI function that a host can have; no known host has it.
const WITH_ABSENT_DEVICE: &str = r#"
address = "00:05.0"

[[endpoint]]
address = "00:10.0"
vfio = "0000:7f:1f.7"
"#;

#[test]
fn check_reports_what_this_host_lacks() {
    let dir = files(&[("vm0.toml", WITH_ABSENT_DEVICE)]);
    let file = dir.path().join("vm0.toml");
    let checked = run(&[OsStr::new("check"), file.as_ref()]);
    assert_eq!(checked.status, Some(1));
    for part in [
        "IOMMU address:    0000:00:05.0\n",
        "endpoint 0000:00:10.0, device 0000:7f:1f.7:\n",
        "  missing: 0000:7f:1f.7: no such device on this host\n",
        "lspci -D",
    ] {
        assert!(checked.stdout.contains(part), "{}", checked.stdout);
    }
    assert!(checked.stderr.contains("missing on this host"));

    let alone = run(&[OsStr::new("check"), "--file-only".as_ref(), file.as_ref()]);
    assert_eq!((alone.status, alone.stderr.as_str()), (Some(0), ""));
    assert!(checked.stdout.starts_with(&alone.stdout));
    assert!(!alone.stdout.contains("this host"));
}

#[test]
fn topology_is_printed_as_text_and_json() {
    let dir = files(&[("vm0.toml", WITH_ABSENT_DEVICE)]);
    let file = dir.path().join("vm0.toml");
    let text = run(&[OsStr::new("topology"), file.as_ref()]);
    assert_eq!((text.status, text.stderr.as_str()), (Some(0), ""));
    for part in [
        "  device 0000:7f:1f.7, not on this host\n",
        "    endpoint 0000:00:10.0, backend iommufd\n",
        "      reports 0xfee00000..=0xfeefffff msi (configuration)\n",
    ] {
        assert!(text.stdout.contains(part), "{}", text.stdout);
    }
    let json = run(&[OsStr::new("topology"), "--json".as_ref(), file.as_ref()]);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
    assert_eq!(json["without_group"][0]["address"], "0000:7f:1f.7");
    assert_eq!(json["groups"], serde_json::json!([]));
}

#[test]
fn the_daemon_refuses_a_bad_configuration() {
    for (args, part) in [
        (&["--iommu", "00:05.0"][..], "--socket-path: is missing"),
        (&["--fd", "3"], "--iommu: is missing"),
        (
            &["--fd", "3", "--iommu", "00:05.0", "--granule", "1k"],
            "--granule: \"1k\" is not a granule",
        ),
        (
            &["--fd", "3", "--iommu", "00:05.0", "--vfio-fd", "00:10.0=4"],
            "--vfio-fd: 0000:00:10.0 is not an endpoint with `vfio`",
        ),
        (
            &["--config", "/nonexistent/vm0.toml"],
            "/nonexistent/vm0.toml: cannot be read",
        ),
    ] {
        let run = run(args);
        assert_eq!(run.status, Some(1), "{args:?}");
        assert!(run.stderr.contains(part), "{part} in {}", run.stderr);
    }
}

#[test]
fn a_priority_that_is_not_allowed_is_refused_with_the_cure() {
    let config = "address = \"00:05.0\"\nrealtime-priority = 7\n";
    let dir = files(&[("vm0.toml", config)]);
    let mut alone = Command::new("setpriv");
    alone.arg("--no-new-privs");
    if fs::metadata("/proc/self").expect("this process").uid() == 0 {
        alone.arg("--bounding-set=-sys_nice,-sys_resource");
    }
    let daemon = alone
        .args([
            "prlimit",
            "--rtprio=0",
            env!("CARGO_BIN_EXE_vhost-device-iommu"),
        ])
        .arg("--config")
        .arg(dir.path().join("vm0.toml"))
        .arg("--socket-path")
        .arg(dir.path().join("vm0.sock"))
        .stdin(Stdio::null())
        .output()
        .expect("setpriv and prlimit of util-linux");
    let error = String::from_utf8_lossy(&daemon.stderr);
    assert_eq!(daemon.status.code(), Some(1), "{error}");
    for part in ["realtime-priority = 7", "LimitRTPRIO=7", "ulimit -r 7"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!dir.path().join("vm0.sock").exists());
}

/// One rule for every socket. The sandbox is not the problem, so no message names it.
#[test]
fn a_folder_that_cannot_hold_a_socket_is_named_with_the_cure() {
    let endpoint =
        |keys: &str| format!("socket = 's'\n[[endpoint]]\naddress = '00:06.0'\n{keys}\n");
    for (place, cure) in [
        (
            "missing/s",
            "the folder missing of the socket missing/s does not exist; make it",
        ),
        (
            "file/s",
            "file, where the socket file/s is to be, is not a folder; choose another path",
        ),
    ] {
        for keys in [
            format!("socket = '{place}'\n"),
            format!("socket = 's'\ncontrol = '{place}'\n"),
            format!("socket = 's'\n[metrics]\nsocket = '{place}'\n"),
            endpoint(&format!("shadow = '{place}'")),
            endpoint(&format!(
                "vfio-user = {{ listen = '{place}', connect = 'c' }}"
            )),
        ] {
            let text = format!("address = '00:05.0'\n{keys}");
            let dir = files(&[("vm0.toml", &text), ("file", "text")]);
            let output = command(&["--config", "vm0.toml"])
                .current_dir(dir.path())
                .output()
                .expect("it runs");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{keys}: {stderr}");
            assert!(stderr.contains(cure), "{keys}: {stderr}");
            for word in ["sandbox", "os error", "Landlock"] {
                assert!(!stderr.contains(word), "{keys}: {word} in {stderr}");
            }
        }
    }
}

#[test]
fn options_that_exclude_each_other_are_refused() {
    for args in [
        &["--fd", "3", "--socket-path", "a"][..],
        &["--fd", "-1"],
        &["--no-reserved", "--reserved", "0..=0xfff:msi"],
        &["--bypass", "maybe"],
        &["--iommu", "00:05.0", "check", "vm0.toml"],
        &["ctl", "sock"],
        &["--iommufd-fd", "-1"],
        &["--iommufd-fd", "three"],
        &["ctl", "sock", "mappings", "--domain", "x"],
    ] {
        let run = run(args);
        assert_eq!(run.status, Some(2), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains("error:"), "{}", run.stderr);
    }
}

#[test]
fn viot_goes_to_a_file_or_a_pipe() {
    let dir = files(&[("vm0.toml", GOOD)]);
    let file = dir.path().join("vm0.toml");
    let table = dir.path().join("vm0.viot");
    let written = run(&[
        OsStr::new("viot"),
        file.as_ref(),
        "-o".as_ref(),
        table.as_ref(),
    ]);
    assert_eq!(written.status, Some(0), "{}", written.stderr);
    let bytes = fs::read(&table).expect("a table");
    assert_eq!((&bytes[..4], bytes.len()), (&b"VIOT"[..], 48 + 16 + 24));

    let piped = command(&[OsStr::new("viot"), file.as_ref()])
        .output()
        .expect("it runs");
    assert_eq!((piped.status.code(), piped.stdout), (Some(0), bytes));

    let nowhere = dir.path().join("absent/vm0.viot");
    let failed = run(&[
        OsStr::new("viot"),
        file.as_ref(),
        "-o".as_ref(),
        nowhere.as_ref(),
    ]);
    assert_eq!(failed.status, Some(1));
    assert!(
        failed.stderr.contains("absent/vm0.viot"),
        "{}",
        failed.stderr
    );
}

/// QEMU cannot give an Arm guest the table, and GRUB can.
#[test]
fn viot_of_an_arm_machine_is_the_same_table_with_a_note() {
    let arm = format!("machine = 'virt'\n{GOOD}");
    let dir = files(&[("arm.toml", &arm), ("x86.toml", GOOD)]);
    let viot = |name: &str| {
        let run = command(&[OsStr::new("viot"), dir.path().join(name).as_ref()]).output();
        let run = run.expect("it runs");
        let stderr = String::from_utf8_lossy(&run.stderr).into_owned();
        assert_eq!(run.status.code(), Some(0), "{stderr}");
        (run.stdout, stderr)
    };
    let ((of_arm, note), (of_x86, nothing)) = (viot("arm.toml"), viot("x86.toml"));
    assert_eq!(of_arm, of_x86);
    assert!(note.contains("GRUB's command acpi"), "{note}");
    assert_eq!(nothing, "");
}

#[test]
fn viot_is_not_written_to_a_terminal() {
    let dir = files(&[("vm0.toml", GOOD)]);
    // A pseudo-terminal; its controlling end stays open in this process.
    let terminal = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/ptmx")
        .expect("a pseudo-terminal");
    let output = command(&[OsStr::new("viot"), dir.path().join("vm0.toml").as_ref()])
        .stdout(terminal)
        .output()
        .expect("it runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("-o FILE"), "{stderr}");
}

#[test]
fn qemu_args_prints_only_arguments() {
    let dir = files(&[("vm0.toml", GOOD)]);
    let file = dir.path().join("vm0.toml");
    let lines = run(&[OsStr::new("qemu-args"), file.as_ref()]);
    assert_eq!(lines.status, Some(0), "{}", lines.stderr);
    let table = dir.path().join("vm0.viot");
    let expected = [
        "-machine",
        "q35,memory-backend=viommu-ram",
        "-m",
        "2048M",
        "-object",
        "memory-backend-memfd,id=viommu-ram,size=2147483648,share=on",
        "-global",
        "ICH9-LPC.disable_s3=1",
        "-global",
        "ICH9-LPC.disable_s4=1",
        "-chardev",
        "socket,id=viommu-socket,path=/run/vm0/iommu.sock",
        "-device",
        "vhost-user-test-device-pci,virtio-id=23,num_vqs=2,vq_size=256,config_size=40,\
         chardev=viommu-socket,addr=05.0",
        "-acpitable",
        &format!("file={}", table.display()),
    ];
    assert_eq!(lines.stdout.lines().collect::<Vec<_>>(), expected);
    assert!(lines.stderr.lines().all(|line| line.starts_with("# ")));
    assert!(
        lines
            .stderr
            .contains("(host group cards): give devices addr=10.0 to addr=1e.7"),
        "{}",
        lines.stderr
    );

    // A shell must read the quoted line as the same arguments.
    let odd = "/tmp/it's \"odd\", $HOME `x`\\.viot";
    let shell = run(&[
        OsStr::new("qemu-args"),
        file.as_ref(),
        "--shell".as_ref(),
        "--viot".as_ref(),
        odd.as_ref(),
    ]);
    assert_eq!(shell.stdout.lines().count(), 1);
    let script = format!("printf '%s\\n' {}", shell.stdout);
    let read = Command::new("sh")
        .arg("-c")
        .arg(script)
        .output()
        .expect("sh");
    let read = String::from_utf8(read.stdout).expect("text");
    let mut expected = expected.map(str::to_owned);
    expected[15] = format!("file={}", odd.replace(',', ",,"));
    assert_eq!(read.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn qemu_args_name_the_descriptors_they_are_given() {
    let text = format!("{GOOD}\n[[endpoint]]\naddress = \"00:02.0\"\nvfio = \"65:00.0\"\n");
    let dir = files(&[("vm0.toml", &text)]);
    let file = dir.path().join("vm0.toml");
    let qemu_args = |options: &[&str]| {
        let args = [&["qemu-args", file.to_str().expect("UTF-8")], options].concat();
        run(&args)
    };
    for (options, iommufd, device) in [
        (&[][..], 3, 4),
        (&["--iommufd-fd", "4"], 4, 3),
        (&["--iommufd-fd", "9", "--vfio-fd", "00:02.0=11"], 9, 11),
    ] {
        let printed = qemu_args(options);
        assert_eq!(printed.status, Some(0), "{}", printed.stderr);
        let lines: Vec<_> = printed.stdout.lines().collect();
        let expected = [
            "-object".to_owned(),
            format!("iommufd,id=viommu-iommufd,fd={iommufd}"),
            "-device".to_owned(),
            format!("vfio-pci,id=viommu-vfio-00-02-0,fd={device},iommufd=viommu-iommufd,addr=02.0"),
        ];
        assert_eq!(lines[6..10], expected);
        let note = format!("--iommufd-fd {iommufd} --vfio-fd 0000:00:02.0={device}");
        assert!(printed.stderr.contains(&note), "{}", printed.stderr);
    }
    let refused = qemu_args(&["--vfio-fd", "00:02.0=11"]);
    assert_eq!((refused.status, refused.stdout.as_str()), (Some(1), ""));
    assert!(
        refused.stderr.contains("--iommufd-fd"),
        "{}",
        refused.stderr
    );
}

#[test]
fn qemu_args_refuses_configurations_that_qemu_cannot_express() {
    let elsewhere = GOOD.replace("00:05.0", "01:05.0");
    let dir = files(&[("vm0.toml", &elsewhere)]);
    let run = run(&[
        OsStr::new("qemu-args"),
        dir.path().join("vm0.toml").as_ref(),
    ]);
    assert_eq!((run.status, run.stdout.as_str()), (Some(1), ""));
    assert!(run.stderr.contains("not on bus 00"), "{}", run.stderr);
}

#[test]
fn libvirt_xml_prints_only_a_domain() {
    let dir = files(&[("vm0.toml", GOOD)]);
    let file = dir.path().join("vm0.toml");
    for (options, table) in [
        (&[][..], "/var/lib/vhost-device-iommu/vm0.viot"),
        (&["--viot", "/t"], "/t"),
    ] {
        let args = [&["libvirt-xml", file.to_str().expect("UTF-8")], options].concat();
        let printed = run(&args);
        assert_eq!((printed.status, printed.stderr.as_str()), (Some(0), ""));
        let document = roxmltree::Document::parse(&printed.stdout).expect("XML");
        let mut nodes = document.descendants();
        let found = nodes.find(|node| node.has_tag_name("table"));
        assert_eq!(found.and_then(|node| node.text()), Some(table));
    }
    let refused = run(&["libvirt-xml", file.to_str().expect("UTF-8"), "--viot", "t"]);
    assert_eq!((refused.status, refused.stdout.as_str()), (Some(1), ""));
    assert!(
        refused.stderr.contains("vm0.toml: the path"),
        "{}",
        refused.stderr
    );
}

#[test]
fn arguments_of_other_vmms_are_printed_alone() {
    let text = "memory = '2G'\naddress = '00:02.0'\n[[endpoint]]\naddress = '00:09.0'\n";
    let vfio_user = format!("vfio-user-socket = '/run/i'\n{text}");
    let vhost_user = format!("socket = '/run/i'\n{text}");
    let dir = files(&[("vm0.toml", &vfio_user), ("vm1.toml", &vhost_user)]);
    let table = dir.path().join("vm1.viot");
    for (file, command, options, expected) in [
        (
            "vm0.toml",
            "cloud-hypervisor-args",
            &["--disks", "1", "--cmdline", "console=ttyS0"][..],
            vec![
                "--memory",
                "size=2048M,shared=on",
                "--user-device",
                "socket=/run/i,pci_device_id=2",
                "--cmdline",
                "console=ttyS0 acpi_rsdp=0xe7f7f000",
            ],
        ),
        (
            "vm1.toml",
            "crosvm-args",
            &[],
            vec![
                "--mem",
                "size=2048",
                "--vhost-user",
                "type=iommu,socket=/run/i,max-queue-size=256,pci-address=00:02.0",
                "--acpi-table",
                table.to_str().expect("UTF-8"),
            ],
        ),
    ] {
        let file = dir.path().join(file);
        let args = [&[command, file.to_str().expect("UTF-8")], options].concat();
        let printed = run(&args);
        assert_eq!(printed.status, Some(0), "{}", printed.stderr);
        assert_eq!(printed.stdout.lines().collect::<Vec<_>>(), expected);
        assert!(printed.stderr.lines().all(|line| line.starts_with("# ")));
        let note = "endpoint 0000:00:09.0: ";
        assert!(printed.stderr.contains(note), "{}", printed.stderr);

        let shell = run(&[&args[..], &["--shell"]].concat());
        let script = format!("printf '%s\\n' {}", shell.stdout);
        let read = Command::new("sh").arg("-c").arg(script).output();
        let read = String::from_utf8(read.expect("sh").stdout).expect("text");
        assert_eq!(read.lines().collect::<Vec<_>>(), expected);
    }
}

#[test]
fn a_closed_pipe_does_not_panic() {
    let dir = files(&[("vm0.toml", GOOD)]);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = command(&[OsStr::new("check"), dir.path().join("vm0.toml").as_ref()])
        .stdout(writer)
        .output()
        .expect("it runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[test]
fn check_accepts_the_examples() {
    let mut count = 0;
    for entry in fs::read_dir(docs().join("examples")).expect("examples") {
        let path = entry.expect("an entry").path();
        for command in [&["check", "--file-only"][..], &["viot"], &["qemu-args"]] {
            let args: Vec<_> = command.iter().map(OsStr::new).collect();
            let run = run(&[&args[..], &[path.as_ref()]].concat());
            assert_eq!(run.status, Some(0), "{command:?} {path:?}: {}", run.stderr);
        }
        count += 1;
    }
    assert!(count >= 4, "{count} examples");
}

/// The page on configuration must list every option for operators, and its table every key of the file.
#[test]
fn the_page_on_configuration_is_complete() {
    let page = fs::read_to_string(docs().join("configuration.md")).expect("the page");
    let command = Args::command();
    for option in command
        .get_arguments()
        .filter(|option| !option.is_hide_set())
    {
        let name = option.get_long().expect("only long options");
        let known = ["config", "print-capabilities"].contains(&name);
        assert!(known || page.contains(&format!("`--{name}")), "--{name}");
    }
    let message = {
        let dir = files(&[("vm0.toml", "nonsense = 1")]);
        run(&[OsStr::new("check"), dir.path().join("vm0.toml").as_ref()]).stderr
    };
    let (_, keys) = message
        .split_once("the keys here are")
        .expect("the list of keys");
    let keys: Vec<_> = keys.split('`').skip(1).step_by(2).collect();
    assert!(keys.len() >= 11, "{keys:?}");
    for key in keys {
        let forms = [key.to_owned(), format!("[{key}]"), format!("[[{key}]]")];
        let listed = |form: &String| page.contains(&format!("| `{form}` |"));
        assert!(forms.iter().any(listed), "{key}");
    }
}

/// VIOMMU_REGENERATE=1 writes the manual page instead of comparing it.
#[test]
fn the_manual_page_is_up_to_date() {
    let path = docs().join("vhost-device-iommu.1");
    let made = manual_page();
    if env::var_os("VIOMMU_REGENERATE").is_some() {
        fs::write(&path, made).expect("written");
        return;
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == made,
        "docs/vhost-device-iommu.1 does not match src/args.rs; \
         run VIOMMU_REGENERATE=1 cargo test --test cli manual_page"
    );
}

/// One page for the program and its subcommands.
fn manual_page() -> String {
    let mut command = Args::command();
    command.build();
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(command.clone());
    man.render_title(&mut page).expect("rendered");
    man.render_name_section(&mut page).expect("rendered");
    let mut page = String::from_utf8(page).expect("text");
    page.push_str(&sections(&command));

    page.push_str(".SH COMMANDS\n");
    describe(&command, command.get_name(), &mut page);
    page.push_str(concat!(
        ".SH EXIT STATUS\n",
        "0 on success, 1 if something was refused or failed, ",
        "2 if the command line cannot be parsed.\n",
        ".SH SEE ALSO\n",
        "docs/configuration.md for the keys of the configuration file.\n",
    ));

    // Each rendered piece begins with the same two lines; the page keeps the first pair only.
    let preamble = |line: &&str| line.starts_with(".ie ") || line.starts_with(".el ");
    let first = page.lines().take(2);
    let rest = page.lines().filter(|line| !preamble(line));
    first.chain(rest).map(|line| format!("{line}\n")).collect()
}

/// Adds the subcommands of `command`, whose full name is `name`.
fn describe(command: &clap::Command, name: &str, page: &mut String) {
    for subcommand in command.get_subcommands() {
        if subcommand.get_name() == "help" {
            continue;
        }
        let nested = subcommand.has_subcommands();
        let name = format!("{name} {}", subcommand.get_name());
        let called = subcommand
            .clone()
            .bin_name(&name)
            .mut_arg("help", |help| help.hide(true));
        let (_, heading) = name.split_once(' ').expect("a subcommand's name");
        page.push_str(&format!(".SS {heading}\n"));
        // Sections of a subcommand become paragraphs of this page.
        for line in sections(&called).lines() {
            page.push_str(if line.starts_with(".SH ") {
                ".PP"
            } else {
                line
            });
            page.push('\n');
        }
        if nested {
            let required = subcommand.get_positionals();
            let names = required.map(|arg| arg.get_id().as_str().to_uppercase());
            let name = std::iter::once(name.clone()).chain(names);
            describe(subcommand, &name.collect::<Vec<_>>().join(" "), page);
        }
    }
}

fn sections(command: &clap::Command) -> String {
    let man = clap_mangen::Man::new(command.clone());
    let mut text = Vec::new();
    man.render_synopsis_section(&mut text).expect("rendered");
    man.render_description_section(&mut text).expect("rendered");
    man.render_options_section(&mut text).expect("rendered");
    String::from_utf8(text).expect("text")
}

struct Run {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

fn run<S: AsRef<OsStr>>(args: &[S]) -> Run {
    let output = command(args).output().expect("it runs");
    Run {
        status: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn command<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"));
    command.args(args).stdin(Stdio::null());
    command
}

fn files(contents: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for (name, content) in contents {
        fs::write(dir.path().join(name), content).expect("written");
    }
    dir
}

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}
