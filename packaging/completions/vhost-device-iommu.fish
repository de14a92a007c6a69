# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_vhost_device_iommu_global_optspecs
    string join \n config= socket-path= fd= ready-fd= control-path= iommu= endpoint= address-width= bypass= granule= reserved= no-reserved machine= memory= arena-limit= iommufd-fd= vfio-fd= vfio-container-fd= no-sandbox sandbox-report print-capabilities h/help V/version
end

function __fish_vhost_device_iommu_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_vhost_device_iommu_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_vhost_device_iommu_using_subcommand
    set -l cmd (__fish_vhost_device_iommu_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l config -d 'Read the configuration from this TOML file' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l socket-path -d 'Create a socket at this path and listen on it for the VMM' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l fd -d 'Listen for the VMM on this inherited descriptor of a listening socket' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l ready-fd -d 'Write a line feed to this inherited descriptor and close it once the sockets listen' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l control-path -d 'Create a control socket at this path, for `ctl`' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l iommu -d 'PCI address of the IOMMU itself, such as 00:05.0' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l endpoint -d 'PCI address of an endpoint, or a range of addresses such as 00:10.0-00:1e.7; may be repeated, and replaces the endpoints of the file' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l address-width -d 'Width of I/O virtual addresses in bits, 32 to 57 [default: 48]' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l bypass -d 'Whether endpoints without a domain bypass the IOMMU at boot [default: on]' -r -f -a "on\t'The switch is on'
off\t'The switch is off'"
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l granule -d 'Smallest page size of a mapping: 4k, 16k, 64k or 2m [default: 4k]' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l reserved -d 'I/O virtual addresses that no endpoint may map; may be repeated, and replaces the list of the file [default: the machine\'s MSI region; of q35 0xfee00000..=0xfeefffff:msi]' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l machine -d 'The machine that the VMM emulates: q35 or virt (Arm) [default: q35]' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l memory -d 'Size of guest RAM, such as 2G' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l arena-limit -d 'Limit of the memory for page tables [default: memory / 256 + 64M]' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l iommufd-fd -d 'Use this inherited descriptor of /dev/iommu' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l vfio-fd -d 'Use this inherited descriptor of a VFIO device for the passthrough endpoint with this address in the guest; may be repeated' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l vfio-container-fd -d 'Use this inherited descriptor of a VFIO container for the passthrough endpoint with this address in the guest; its IOMMU type must have been set (VFIO_SET_IOMMU); may be repeated' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l no-reserved -d 'Use an empty list of reserved addresses, without the default MSI region'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l no-sandbox -d 'Run without the sandbox; for debugging only: a guest that exploits the daemon gets all its rights on the host'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l sandbox-report -d 'Name a forbidden system call on standard error before the process ends, instead of ending at once; for debugging only'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -l print-capabilities -d 'Print the capabilities of this backend as JSON and exit; other arguments are ignored'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -s V -l version -d 'Print version'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "check" -d 'Check a configuration file and print a summary'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "topology" -d 'Print the devices of this host behind the endpoints, their groups and reserved regions'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "resolve" -d 'Ask QEMU for the addresses of endpoints that name their device'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "viot" -d 'Write the ACPI VIOT table, which tells the guest the endpoints of the IOMMU'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "dtb" -d 'Add the IOMMU and its endpoints to the device tree of an Arm guest'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "qemu-args" -d 'Print the arguments of QEMU (10.2 or later) for a configuration, one in a line'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "cloud-hypervisor-args" -d 'Print the arguments of cloud-hypervisor for a configuration, one in a line'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "crosvm-args" -d 'Print the arguments of `crosvm run` for a configuration, one in a line'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "libvirt-xml" -d 'Print a libvirt domain for a configuration, as XML'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "drop-in" -d 'Print the systemd settings that a configuration needs, as a drop-in for vhost-device-iommu@.service'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "launch" -d 'Start the daemon and a VMM (QEMU 10.2 or later, or cloud-hypervisor), and end them together'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "upgrade" -d 'Have the running daemon of a VM leave the VM to this program, if this program can go on with it'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "adopt" -d 'Hand the open VFIO devices of a VMM to the daemon of its VM'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "ctl" -d 'Query or change a running daemon'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand check" -l file-only -d 'Do not check this host'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand check" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand topology" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand topology" -s h -l help -d 'Print help'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand resolve" -l qmp -d 'QEMU\'s QMP socket, if it is not `qmp` of the file' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand resolve" -l write -d 'Write the keys into the file'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand resolve" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand viot" -s o -l output -d 'Write to this file instead of standard output, which must not be a terminal' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand viot" -s h -l help -d 'Print help'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand dtb" -l base -d 'The device tree of the VMM, without the IOMMU' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand dtb" -s o -l output -d 'Write to this file instead of standard output, which must not be a terminal' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand dtb" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand qemu-args" -l viot -d 'Path at which QEMU finds the table written by `viot`, or the device tree written by `dtb` [default: FILE with the ending .viot or .dtb]' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand qemu-args" -l iommufd-fd -d 'Use this inherited descriptor of /dev/iommu' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand qemu-args" -l vfio-fd -d 'Use this inherited descriptor of a VFIO device for the passthrough endpoint with this address in the guest; may be repeated' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand qemu-args" -l shell -d 'Print one line, quoted for a POSIX shell'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand qemu-args" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand cloud-hypervisor-args" -l disks -d 'The number of --disk options that the VMM will have, which move the BAR' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand cloud-hypervisor-args" -l cmdline -d 'The other parameters of the guest\'s kernel' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand cloud-hypervisor-args" -l iommufd-fd -d 'Use this inherited descriptor of /dev/iommu' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand cloud-hypervisor-args" -l vfio-fd -d 'Use this inherited descriptor of a VFIO device for the passthrough endpoint with this address in the guest; may be repeated' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand cloud-hypervisor-args" -l shell -d 'Print one line, quoted for a POSIX shell'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand cloud-hypervisor-args" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand crosvm-args" -l viot -d 'Path at which crosvm finds the table written by `viot` [default: FILE with the ending .viot]' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand crosvm-args" -l shell -d 'Print one line, quoted for a POSIX shell'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand crosvm-args" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand libvirt-xml" -l viot -d 'Absolute path at which QEMU finds the table written by `viot`, or the device tree written by `dtb` [default: FILE\'s name in /var/lib/vhost-device-iommu, with the ending .viot or .dtb]' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand libvirt-xml" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand drop-in" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand launch" -l config -d 'The configuration' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand launch" -l vmm -d 'The kind of the VMM [default: cloud-hypervisor if its program\'s name begins like that, else qemu]' -r -f -a "qemu\t'QEMU'
cloud-hypervisor\t'cloud-hypervisor'"
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand launch" -l viot -d 'Write the VIOT table or the device tree to this file and keep it. Without it, QEMU gets an unnamed file' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand launch" -l max-restarts -d 'Start a daemon that has ended again up to this many times a minute; beyond that, end the VMM' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand launch" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand upgrade" -l control -d 'The control socket of the daemon, if it is not `control` of the file' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand upgrade" -l no-wait -d 'Do not wait for the next daemon. For ExecReload= of a unit, because systemd starts the next daemon only when this command has ended'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand upgrade" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand adopt" -l config -d 'The configuration of the VM' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand adopt" -l socket-path -d 'Create the socket at this path, for this process\'s user, and serve whoever may connect to it' -r -F
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand adopt" -l socket-group -d 'Let the users of the group with this number connect, too' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand adopt" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -s h -l help -d 'Print help'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "status" -d 'Show the VM, its endpoints, domains and device processes, and counters'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "endpoints" -d 'List all endpoints'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "domains" -d 'List all domains'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "mappings" -d 'List mappings'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "faults" -d 'List refused accesses: the last 256, and counts'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "translate" -d 'Translate an I/O virtual address of an endpoint'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "add-endpoint" -d 'Add an endpoint to the running VM'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "remove-endpoint" -d 'Remove an endpoint from the running VM'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "stats" -d 'Show all counters, the durations of request batches, and each limit with its use'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "watch" -d 'Show the rates of the counters, every second until interrupted'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "log-level" -d 'Show or change the log level of the daemon'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and not __fish_seen_subcommand_from status endpoints domains mappings faults translate add-endpoint remove-endpoint stats watch log-level help" -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from status" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from status" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from endpoints" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from endpoints" -s h -l help -d 'Print help'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from domains" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from domains" -s h -l help -d 'Print help'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from mappings" -l domain -d 'Only mappings of this domain' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from mappings" -l iova -d 'Only mappings that share an address with this range, such as 0x1000..=0x2fff' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from mappings" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from mappings" -s h -l help -d 'Print help'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from faults" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from faults" -s h -l help -d 'Print help'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from translate" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from translate" -s h -l help -d 'Print help'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from add-endpoint" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from add-endpoint" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from remove-endpoint" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from remove-endpoint" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from stats" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from stats" -s h -l help -d 'Print help'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from watch" -l interval -d 'Seconds between two queries' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from watch" -l count -d 'End after this many queries' -r
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from watch" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from watch" -s h -l help -d 'Print help'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from log-level" -l json -d 'Print JSON'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from log-level" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "status" -d 'Show the VM, its endpoints, domains and device processes, and counters'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "endpoints" -d 'List all endpoints'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "domains" -d 'List all domains'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "mappings" -d 'List mappings'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "faults" -d 'List refused accesses: the last 256, and counts'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "translate" -d 'Translate an I/O virtual address of an endpoint'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "add-endpoint" -d 'Add an endpoint to the running VM'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "remove-endpoint" -d 'Remove an endpoint from the running VM'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "stats" -d 'Show all counters, the durations of request batches, and each limit with its use'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "watch" -d 'Show the rates of the counters, every second until interrupted'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "log-level" -d 'Show or change the log level of the daemon'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "check" -d 'Check a configuration file and print a summary'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "topology" -d 'Print the devices of this host behind the endpoints, their groups and reserved regions'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "resolve" -d 'Ask QEMU for the addresses of endpoints that name their device'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "viot" -d 'Write the ACPI VIOT table, which tells the guest the endpoints of the IOMMU'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "dtb" -d 'Add the IOMMU and its endpoints to the device tree of an Arm guest'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "qemu-args" -d 'Print the arguments of QEMU (10.2 or later) for a configuration, one in a line'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "cloud-hypervisor-args" -d 'Print the arguments of cloud-hypervisor for a configuration, one in a line'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "crosvm-args" -d 'Print the arguments of `crosvm run` for a configuration, one in a line'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "libvirt-xml" -d 'Print a libvirt domain for a configuration, as XML'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "drop-in" -d 'Print the systemd settings that a configuration needs, as a drop-in for vhost-device-iommu@.service'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "launch" -d 'Start the daemon and a VMM (QEMU 10.2 or later, or cloud-hypervisor), and end them together'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "upgrade" -d 'Have the running daemon of a VM leave the VM to this program, if this program can go on with it'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "adopt" -d 'Hand the open VFIO devices of a VMM to the daemon of its VM'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "ctl" -d 'Query or change a running daemon'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and not __fish_seen_subcommand_from check topology resolve viot dtb qemu-args cloud-hypervisor-args crosvm-args libvirt-xml drop-in launch upgrade adopt ctl help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "status" -d 'Show the VM, its endpoints, domains and device processes, and counters'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "endpoints" -d 'List all endpoints'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "domains" -d 'List all domains'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "mappings" -d 'List mappings'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "faults" -d 'List refused accesses: the last 256, and counts'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "translate" -d 'Translate an I/O virtual address of an endpoint'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "add-endpoint" -d 'Add an endpoint to the running VM'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "remove-endpoint" -d 'Remove an endpoint from the running VM'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "stats" -d 'Show all counters, the durations of request batches, and each limit with its use'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "watch" -d 'Show the rates of the counters, every second until interrupted'
complete -c vhost-device-iommu -n "__fish_vhost_device_iommu_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "log-level" -d 'Show or change the log level of the daemon'
