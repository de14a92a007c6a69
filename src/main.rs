//! The `vhost-device-iommu` program: arguments in, exit status out.

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use vhost_device_iommu::adopt::Policy;
use vhost_device_iommu::adopt::server::{self, confine};
use vhost_device_iommu::args::{Args, CliCommand, DescriptorArgs, Question, RunArgs, VmmChoice};
use vhost_device_iommu::config::{Config, Machine};
use vhost_device_iommu::ctl;
use vhost_device_iommu::daemon::Daemon;
use vhost_device_iommu::daemon::drop_in::drop_in;
use vhost_device_iommu::daemon::sandbox_needs;
use vhost_device_iommu::daemon::signals;
use vhost_device_iommu::daemon::upgrade::Upgrade;
use vhost_device_iommu::host::check::Report;
use vhost_device_iommu::host::sysfs::HostRoot;
use vhost_device_iommu::host::tree::HostTree;
use vhost_device_iommu::logging;
use vhost_device_iommu::logging::journal;
use vhost_device_iommu::process::connector;
use vhost_device_iommu::process::fatal::end_on_fatal_faults;
use vhost_device_iommu::process::inherited;
use vhost_device_iommu::process::ready::ReadyDescriptor;
use vhost_device_iommu::process::sandbox::{self, Role, Violation};
use vhost_device_iommu::process::service::Service;
use vhost_device_iommu::process::socket::{SocketRights, bind_for};
use vhost_device_iommu::process::supervisor::Supervisor;
use vhost_device_iommu::process::watchdog::Watchdog;
use vhost_device_iommu::qemu::args::{QemuArgs, default_table_path, shell_line};
use vhost_device_iommu::qemu::resolve::{Resolution, ResolveError, replace};
use vhost_device_iommu::topology::{device_tree, viot};
use vhost_device_iommu::vmms::cloud_hypervisor::CloudHypervisorOptions;
use vhost_device_iommu::vmms::launch::{Launch, VmmKind, read_tree};
use vhost_device_iommu::vmms::{VmmArgs, VmmArgsError, cloud_hypervisor, crosvm, libvirt};

/// The exit status of `upgrade` if the daemon has left and the next one has not taken everything over.
const NOT_TAKEN_OVER: u8 = 3;

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> ExitCode {
    let outcome = if asks_for_capabilities() {
        print_capabilities().map(|()| ExitCode::SUCCESS)
    } else {
        dispatch(&Args::parse())
    };
    match outcome {
        Ok(status) => status,
        Err(error) => {
            report(&*error);
            ExitCode::FAILURE
        }
    }
}

fn report(error: &dyn Error) {
    // Ignored: the write fails if standard error is closed, and the error has nowhere else to go.
    let _ = if journal::stderr_is_journal() {
        journal::write_error(&mut io::stderr(), &error.to_string())
    } else {
        writeln!(io::stderr(), "vhost-device-iommu: {error}")
    };
}

/// Whether `--print-capabilities` is anywhere before `--`. Not left to the parser: the option must work even
/// beside arguments that the parser refuses.
fn asks_for_capabilities() -> bool {
    std::env::args_os()
        .skip(1)
        .take_while(|arg| arg != OsStr::new("--"))
        .any(|arg| arg == OsStr::new("--print-capabilities"))
}

/// Prints the capabilities in the format of the vhost-user specification, section "Backend program conventions".
fn print_capabilities() -> Outcome {
    let capabilities = serde_json::json!({ "type": "iommu", "features": [] });
    print(&format!("{capabilities:#}\n"))
}

fn dispatch(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    let done = match &args.command {
        None => serve(&args.run),
        Some(CliCommand::Check { file, file_only }) => check(file, *file_only),
        Some(CliCommand::Topology { file, json }) => print_topology(file, *json),
        Some(CliCommand::Resolve { file, qmp, write }) => resolve(file, qmp.as_deref(), *write),
        Some(CliCommand::Viot { file, output }) => write_viot(file, output.as_deref()),
        Some(CliCommand::Dtb { file, base, output }) => {
            write_device_tree(file, base, output.as_deref())
        }
        Some(CliCommand::QemuArgs {
            file,
            viot,
            shell,
            descriptors,
        }) => print_qemu_args(file, viot.as_deref(), *shell, descriptors),
        Some(CliCommand::CloudHypervisorArgs {
            file,
            disks,
            cmdline,
            shell,
            descriptors,
        }) => print_cloud_hypervisor_args(file, *disks, cmdline, *shell, descriptors),
        Some(CliCommand::CrosvmArgs { file, viot, shell }) => {
            print_crosvm_args(file, viot.as_deref(), *shell)
        }
        Some(CliCommand::LibvirtXml { file, viot }) => print_libvirt_domain(file, viot.as_deref()),
        Some(CliCommand::Ctl {
            socket,
            json,
            question,
        }) => control(socket, question, *json),
        Some(CliCommand::DropIn { file }) => print_drop_in(file),
        Some(CliCommand::Adopt {
            config,
            socket_path,
            socket_group,
        }) => adopt(config, socket_path.as_deref(), *socket_group),
        Some(CliCommand::Upgrade {
            file,
            control,
            no_wait,
        }) => return upgrade(file, control.as_deref(), *no_wait),
        Some(CliCommand::Launch {
            config,
            kind,
            viot,
            max_restarts,
            vmm,
        }) => {
            return launch(config, *kind, viot.as_deref(), *max_restarts, vmm);
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Serves one VM until a signal ends the daemon.
fn serve(args: &RunArgs) -> Outcome {
    let supervisor = Supervisor::find(args.keeper_fd, &args.kept_fd)?;
    let mut args = args.clone();
    if let Some(fd) = supervisor.service.socket()
        && args.socket_path.is_none()
    {
        args.fd.get_or_insert(fd);
    }
    let args = &args;
    let config = Config::try_from(args)?;
    let ready = ReadyDescriptor::adopt(args.ready_fd)?;
    logging::init(&config.name);
    supervisor.log_losses();
    let Supervisor { service, keeper } = supervisor;
    end_on_fatal_faults()?;
    if args.no_sandbox {
        log::warn!("running without the sandbox, which is for debugging only (--no-sandbox)");
    } else {
        let violation = if args.sandbox_report {
            Violation::Report
        } else {
            Violation::Kill
        };
        let needs = sandbox_needs::needs(&config, keeper.is_present());
        let has_connector = needs.has_connector();
        sandbox::arm(needs, violation)?;
        if has_connector {
            connector::start(sandbox_needs::reachable_sockets(&config))?;
        }
    }
    let signal_handler = signals::handle_signals()?;
    let keeper = Arc::new(keeper);
    let mut daemon = Daemon::new(&config, keeper)?;
    signal_handler.set_daemon(daemon.stop_handle());
    let service = Arc::new(service);
    let manager = service.clone();
    let _watchdog = service
        .watchdog()
        .map(|deadline| {
            let alive = move || manager.notify("WATCHDOG=1");
            Watchdog::start(daemon.pulses(), deadline, alive)
        })
        .transpose()?;
    sandbox::enter(Role::Main);
    if let Err(cause) = ready.notify() {
        log::warn!("cannot write to the descriptor of --ready-fd: {cause}");
    }
    notify(&service, "READY=1");
    daemon.run()?;
    notify(&service, "STOPPING=1");
    Ok(())
}

/// Sends a notification. A failure is only logged: the daemon works without the service manager.
fn notify(service: &Service, state: &str) {
    if let Err(cause) = service.notify(state) {
        log::warn!("cannot send {state} to the service manager: {cause}");
    }
}

/// Starts the daemon and the VMM of one VM, and waits until they end.
fn launch(
    config: &Path,
    kind: Option<VmmChoice>,
    table: Option<&Path>,
    max_restarts: u32,
    vmm: &[OsString],
) -> Result<ExitCode, Box<dyn Error>> {
    let daemon = std::env::current_exe().map_err(|cause| {
        format!("cannot find this program to start the daemon: {cause}; is /proc mounted?")
    })?;
    let launch = Launch {
        config,
        table,
        vmm,
        max_restarts,
        kind: kind.map(|kind| match kind {
            VmmChoice::Qemu => VmmKind::Qemu,
            VmmChoice::CloudHypervisor => VmmKind::CloudHypervisor,
        }),
        daemon: &daemon,
        host: &HostRoot::default(),
    };
    Ok(ExitCode::from(launch.run()?))
}

/// Hands the open VFIO devices of a VMM to its daemon.
fn adopt(config: &Path, socket_path: Option<&Path>, group: Option<u32>) -> Outcome {
    let root = HostRoot::default();
    if let Some(path) = socket_path {
        let rights = SocketRights {
            mode: Some(if group.is_some() { 0o660 } else { 0o600 }),
            group,
        };
        let (listener, _file) = bind_for(path, rights)?;
        confine()?;
        server::serve(&listener, &Policy::OneFile(config.to_owned()), &root);
        return Ok(());
    }
    // First: a file that is opened earlier could get the number of a descriptor that is not there.
    let passed = Service::from_environment()?.socket();
    let passed = passed.ok_or(
        "no socket is passed; let vhost-device-iommu-adopt@NAME.socket start the helper, or give --socket-path",
    )?;
    let listener = UnixListener::from(inherited::adopt(passed)?);
    confine()?;
    let policy = Policy::OneService(config.to_owned());
    Ok(server::serve_next(&listener, &policy, &root)?)
}

/// Queries a running daemon and prints its answer.
fn control(socket: &Path, question: &Question, json: bool) -> Outcome {
    if let Question::Watch { interval, count } = question {
        let interval = Duration::from_secs(*interval);
        return Ok(ctl::watch(
            socket,
            interval,
            *count,
            json,
            &mut io::stdout(),
        )?);
    }
    let answer = ctl::ask(socket, question)?;
    if json {
        print(&format!("{answer:#}\n"))
    } else {
        print(&ctl::render(question, &answer))
    }
}

/// Has a running daemon leave its VM to this program.
fn upgrade(file: &Path, control: Option<&Path>, no_wait: bool) -> Result<ExitCode, Box<dyn Error>> {
    let upgrade = Upgrade::new(file, control).map_err(|error| match error.warning() {
        Some(warning) => format!("{error}. Careful: {warning}").into(),
        None => Box::<dyn Error>::from(error),
    })?;
    upgrade.leave()?;
    if no_wait {
        return Ok(ExitCode::SUCCESS);
    }
    match upgrade.wait() {
        Ok(next) => print(&format!("{next}\n"))?,
        Err(error) => {
            report(&error);
            return Ok(ExitCode::from(NOT_TAKEN_OVER));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn check(file: &Path, file_only: bool) -> Outcome {
    let config = Config::from_file(file)?;
    print(&config.summary().to_string())?;
    let report = if file_only {
        Report::of_file(&config)
    } else {
        Report::new(&HostRoot::default(), &config).with_file(file, &config)
    };
    print(&report.to_string())?;
    if report.missing_in_the_guest() > 0 {
        return Err("the guest would lack its IOMMU or a device; see above".into());
    }
    match report.missing() {
        0 => Ok(()),
        1 => Err("one thing is missing on this host; see above".into()),
        count => Err(format!("{count} things are missing on this host; see above").into()),
    }
}

fn print_topology(file: &Path, json: bool) -> Outcome {
    let tree = HostTree::new(&HostRoot::default(), &Config::from_file(file)?)?;
    if json {
        print(&format!("{}\n", serde_json::to_string_pretty(&tree)?))
    } else {
        print(&tree.to_string())
    }
}

/// Prints the addresses that a file lacks, or writes them into it.
fn resolve(file: &Path, qmp: Option<&Path>, write: bool) -> Outcome {
    let named = |error: ResolveError| match error {
        ResolveError::File(error) => Box::<dyn Error>::from(error),
        error => format!("{}: {error}", file.display()).into(),
    };
    let resolution = Resolution::new(file, qmp).map_err(named)?;
    if resolution.found.is_empty() {
        return print("# no endpoint that names its device lacks an address\n");
    }
    if write {
        replace(file, &resolution.text).map_err(named)?;
    }
    let found = resolution.found.iter().map(ToString::to_string);
    print(&found.collect::<String>())
}

fn write_viot(file: &Path, output: Option<&Path>) -> Outcome {
    let config = Config::from_file(file)?;
    if config.machine == Machine::Virt {
        io::stderr().write_all(
            b"# QEMU has no option for ACPI tables on the machine virt: load this one with GRUB's command acpi, under a \
              UEFI firmware. A guest that boots by device tree needs `vhost-device-iommu dtb`\n",
        )?;
    }
    write_table(&viot::table(&config.topology)?, output)
}

fn write_device_tree(file: &Path, base: &Path, output: Option<&Path>) -> Outcome {
    let config = Config::from_file(file)?;
    if config.machine != Machine::Virt {
        return Err(format!(
            "{}: only guests of the machine virt find the IOMMU in a device tree; write `machine = \"virt\"`, or \
             use `vhost-device-iommu viot` for an x86 guest",
            file.display()
        )
        .into());
    }
    let tree = device_tree::extended(&read_tree(base)?, &config.topology)
        .map_err(|error| format!("{}: {error}", base.display()))?;
    write_table(&tree, output)
}

/// Writes a table to a file, or to standard output.
fn write_table(table: &[u8], output: Option<&Path>) -> Outcome {
    let Some(output) = output else {
        let mut stdout = io::stdout();
        if stdout.is_terminal() {
            return Err("the table is binary and standard output is a terminal; \
                        give -o FILE or redirect the output"
                .into());
        }
        stdout.write_all(table)?;
        return Ok(stdout.flush()?);
    };
    fs::write(output, table).map_err(|cause| {
        let output = output.display();
        format!("cannot write {output}: {cause}; give a path that can be written with -o").into()
    })
}

fn print_drop_in(file: &Path) -> Outcome {
    print(&drop_in(file, &Config::from_file(file)?))
}

fn print_qemu_args(
    file: &Path,
    table: Option<&Path>,
    shell: bool,
    descriptors: &DescriptorArgs,
) -> Outcome {
    let config = Config::with_descriptors(file, descriptors)?;
    let table = table.map_or_else(|| default_table_path(file, config.machine), Path::to_owned);
    let args = QemuArgs::new(&config, &table).map_err(|error| {
        let file = file.display();
        format!("{file}: {error}")
    })?;
    print_arguments(&args.arguments, &args.notes, shell)
}

fn print_cloud_hypervisor_args(
    file: &Path,
    disks: u16,
    cmdline: &str,
    shell: bool,
    descriptors: &DescriptorArgs,
) -> Outcome {
    let config = Config::with_descriptors(file, descriptors)?;
    let options = CloudHypervisorOptions { disks, cmdline };
    let made = cloud_hypervisor::arguments(&config, options, &HostRoot::default());
    print_vmm_args(file, made, shell)
}

fn print_crosvm_args(file: &Path, viot: Option<&Path>, shell: bool) -> Outcome {
    let viot = viot.map_or_else(|| default_table_path(file, Machine::Q35), Path::to_owned);
    print_vmm_args(
        file,
        crosvm::arguments(&Config::from_file(file)?, &viot, &HostRoot::default()),
        shell,
    )
}

fn print_libvirt_domain(file: &Path, table: Option<&Path>) -> Outcome {
    let config = Config::from_file(file)?;
    let table = table.map_or_else(|| libvirt::table_path(file, config.machine), Path::to_owned);
    let domain =
        libvirt::domain(&config, &table).map_err(|error| format!("{}: {error}", file.display()))?;
    print(&domain)
}

fn print_vmm_args(file: &Path, made: Result<VmmArgs, VmmArgsError>, shell: bool) -> Outcome {
    let args = made.map_err(|error| format!("{}: {error}", file.display()))?;
    print_arguments(&args.arguments, &args.notes, shell)
}

fn print_arguments(arguments: &[String], notes: &[String], shell: bool) -> Outcome {
    // Not on standard output, which another program may read.
    let notes: String = notes.iter().map(|note| format!("# {note}\n")).collect();
    io::stderr().write_all(notes.as_bytes())?;
    if shell {
        print(&format!("{}\n", shell_line(arguments)))
    } else {
        let lines: String = arguments.iter().map(|arg| format!("{arg}\n")).collect();
        print(&lines)
    }
}

/// Prints to standard output. Unlike `println!`, it fails instead of panicking if the reader has gone.
fn print(text: &str) -> Outcome {
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}
