# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# A firmware table with CANWBS for the arm64 L1 machine. Linux lets a process nest tables below an SMMUv3 without S2FWB only if
# the IORT promises for the root complex that all accesses are coherent (CANWBS, "ensured coherency of accesses"). QEMU's
# SMMU has no S2FWB and QEMU's IORT does not promise it, though its emulated devices always are coherent. The kernel
# replaces a table by one from the beginning of the initramfs if that one's revision is higher (CONFIG_ACPI_TABLE_UPGRADE).

# coherent_iort IORT OUT: writes OUT, an archive for the beginning of an initramfs, with the table of the file IORT and
# CANWBS for each of its root complexes. Needs VIOMMU_IASL and VIOMMU_BUSYBOX.
coherent_iort() {
    local folder root=kernel/firmware/acpi
    # iasl 20250404 compiles this number and ignores the line of the flag below it.
    local flags='(Memory Flags \(decoded below\) : 0)3$' revision='(Oem Revision : 0000000)1$'
    folder=$(mktemp -d)
    cp "$1" "$folder/iort.dat"
    (
        cd "$folder"
        "$VIOMMU_IASL" -d iort.dat >log 2>&1 &&
            sed -E "s/$flags/\\17/; s/$revision/\\12/" iort.dsl >coherent.dsl &&
            "$VIOMMU_IASL" -p coherent coherent.dsl >>log 2>&1 &&
            "$VIOMMU_IASL" -p check -d coherent.aml >>log 2>&1 || { tail -n 5 log >&2; exit 1; }
        grep -q 'Oem Revision : 00000002$' check.dsl && grep -q 'Ensured Coherency of Accesses : 1$' check.dsl || exit 1
        mkdir -p $root
        mv coherent.aml $root/iort.aml
        # The kernel looks for tables in archives without compression only.
        find kernel | LC_ALL=C sort | "$VIOMMU_BUSYBOX" cpio -o -H newc -R 0:0 2>/dev/null >archive
    ) || die "the firmware's IORT of L1 is not one that iasl can change (output above, if any)"
    mv "$folder/archive" "$2"
    rm -rf "$folder"
}
