//! The `vhost-device-iommu` program: arguments in, exit status out.

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use vhost_device_iommu::args::{Args, Command, DescriptorArgs, Question, RunArgs};
use vhost_device_iommu::config::Config;
use vhost_device_iommu::ctl;
use vhost_device_iommu::daemon::Daemon;
use vhost_device_iommu::daemon::drop_in::drop_in;
use vhost_device_iommu::daemon::sandbox_needs;
use vhost_device_iommu::daemon::signals;
use vhost_device_iommu::host::check::Report;
use vhost_device_iommu::host::sysfs::HostRoot;
use vhost_device_iommu::host::tree::HostTree;
use vhost_device_iommu::logging;
use vhost_device_iommu::logging::journal;
use vhost_device_iommu::process::ready::Ready;
use vhost_device_iommu::process::sandbox::{self, Role, Violation};
use vhost_device_iommu::process::service::Service;
use vhost_device_iommu::process::watchdog::Watchdog;
use vhost_device_iommu::qemu::args::{QemuArgs, default_viot_path};
use vhost_device_iommu::qemu::launch::Launch;
use vhost_device_iommu::topology::viot;

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
            // Nobody is left to tell where standard error is closed.
            let _ = if journal::is_listening() {
                journal::write_error(&mut io::stderr(), &error.to_string())
            } else {
                writeln!(io::stderr(), "vhost-device-iommu: {error}")
            };
            ExitCode::FAILURE
        }
    }
}

/// Whether `--print-capabilities` stands anywhere before `--`. Looked for by hand, since it must
/// work whatever else is there, even what the parser would refuse.
fn asks_for_capabilities() -> bool {
    std::env::args_os()
        .skip(1)
        .take_while(|arg| arg != OsStr::new("--"))
        .any(|arg| arg == OsStr::new("--print-capabilities"))
}

/// The form is that of the vhost-user specification, "Backend program conventions".
fn print_capabilities() -> Outcome {
    let capabilities = serde_json::json!({ "type": "iommu", "features": [] });
    print(&format!("{capabilities:#}\n"))
}

fn dispatch(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    let done = match &args.command {
        None => serve(&args.run),
        Some(Command::Check { file, file_only }) => check(file, *file_only),
        Some(Command::Topology { file, json }) => print_topology(file, *json),
        Some(Command::Viot { file, output }) => write_viot(file, output.as_deref()),
        Some(Command::QemuArgs {
            file,
            viot,
            shell,
            descriptors,
        }) => print_qemu_args(file, viot.as_deref(), *shell, descriptors),
        Some(Command::Ctl {
            socket,
            json,
            question,
        }) => control(socket, question, *json),
        Some(Command::DropIn { file }) => print_drop_in(file),
        Some(Command::Launch { config, viot, vmm }) => {
            return launch(config, viot.as_deref(), vmm);
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Serves one VM until told to stop.
fn serve(args: &RunArgs) -> Outcome {
    let service = Service::from_environment()?;
    let mut args = args.clone();
    if let Some(fd) = service.socket()
        && args.socket_path.is_none()
    {
        args.fd.get_or_insert(fd);
    }
    let args = &args;
    let config = Config::try_from(args)?;
    let ready = Ready::adopt(args.ready_fd)?;
    logging::init(&config.name);
    if args.no_sandbox {
        log::warn!("running without the sandbox, which is for debugging only (--no-sandbox)");
    } else {
        let violation = if args.sandbox_report {
            Violation::Report
        } else {
            Violation::Kill
        };
        sandbox::arm(sandbox_needs::needs(&config), violation)?;
    }
    let ending = signals::end_on_signals()?;
    let mut daemon = Daemon::new(&config)?;
    ending.of(daemon.stop_handle());
    let service = Arc::new(service);
    let listener = service.clone();
    let _watchdog = service
        .watchdog()
        .map(|patience| {
            let alive = move || listener.tell("WATCHDOG=1");
            Watchdog::start(daemon.pulses(), patience, alive)
        })
        .transpose()?;
    sandbox::enter(Role::Main);
    if let Err(cause) = ready.tell() {
        log::warn!("nobody could be told that the daemon is ready: {cause}");
    }
    tell(&service, "READY=1");
    daemon.run()?;
    tell(&service, "STOPPING=1");
    Ok(())
}

/// What the service manager does not hear, it finds out for itself.
fn tell(service: &Service, state: &str) {
    if let Err(cause) = service.tell(state) {
        log::warn!("the service manager could not be told {state}: {cause}");
    }
}

/// Runs one VM, the daemon and the VMM, until it ends.
fn launch(
    config: &Path,
    viot: Option<&Path>,
    vmm: &[OsString],
) -> Result<ExitCode, Box<dyn Error>> {
    let daemon = std::env::current_exe().map_err(|cause| {
        format!("cannot find this program, which is the daemon's too: {cause}; is /proc mounted?")
    })?;
    let launch = Launch {
        config,
        viot,
        vmm,
        daemon: &daemon,
        host: &HostRoot::default(),
    };
    Ok(ExitCode::from(launch.run()?))
}

/// Asks a running daemon and prints its answer.
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

fn check(file: &Path, file_only: bool) -> Outcome {
    let config = Config::from_file(file)?;
    print(&config.summary().to_string())?;
    if file_only {
        return Ok(());
    }
    let report = Report::new(&HostRoot::default(), &config);
    print(&report.to_string())?;
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

fn write_viot(file: &Path, output: Option<&Path>) -> Outcome {
    let table = viot::table(&Config::from_file(file)?.topology)?;
    let Some(output) = output else {
        let mut stdout = io::stdout();
        if stdout.is_terminal() {
            return Err("the table is binary and standard output is a terminal; \
                        give -o FILE or redirect the output"
                .into());
        }
        stdout.write_all(&table)?;
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
    viot: Option<&Path>,
    shell: bool,
    descriptors: &DescriptorArgs,
) -> Outcome {
    let config = Config::with_descriptors(file, descriptors)?;
    let viot = viot.map_or_else(|| default_viot_path(file), Path::to_owned);
    let args = QemuArgs::new(&config, &viot).map_err(|error| {
        let file = file.display();
        format!("{file}: {error}")
    })?;
    // Not on standard output, where the arguments are for a program to read.
    let notes: String = args
        .notes
        .iter()
        .map(|note| format!("# {note}\n"))
        .collect();
    io::stderr().write_all(notes.as_bytes())?;
    if shell {
        print(&format!("{}\n", args.shell_line()))
    } else {
        let lines: String = args
            .arguments
            .iter()
            .map(|arg| format!("{arg}\n"))
            .collect();
        print(&lines)
    }
}

/// Unlike `println!`, fails rather than panics where the reader has gone.
fn print(text: &str) -> Outcome {
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}
