//! A bar chart of the figures, as SVG.

use std::fmt::Write;

use crate::Row;

const WIDTH: f64 = 760.0;
const LABELS: f64 = 190.0;
const BAR: f64 = 12.0;
const GROUP: f64 = 36.0;
const TOP: f64 = 50.0;

/// One pair of bars for each measure: QEMU's own device above the daemon.
pub fn bars(rows: &[Row]) -> String {
    let longest = rows
        .iter()
        .flat_map(|row| row.qemu.into_iter().chain(row.ours))
        .fold(1.0, f64::max);
    let scale = (WIDTH - LABELS - 110.0) / longest;
    let height = TOP + GROUP * 2.0 * rows.len() as f64 + 10.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"14\">Microseconds of one call, as the guest sees it</text>\n\
         <rect x=\"10\" y=\"30\" width=\"10\" height=\"10\" fill=\"#bbbbbb\"/>\
         <text x=\"25\" y=\"39\">QEMU's own virtio-iommu</text>\n\
         <rect x=\"190\" y=\"30\" width=\"10\" height=\"10\" fill=\"#1f6fb2\"/>\
         <text x=\"205\" y=\"39\">the daemon</text>\n"
    );
    let mut y = TOP;
    for row in rows {
        for (request, name) in ["map", "unmap"].into_iter().enumerate() {
            let label = row.name.replace('_', " ");
            let _ = writeln!(
                svg,
                "<text x=\"10\" y=\"{:.0}\">{label}: {name}</text>",
                y + BAR + 4.0
            );
            let both = [
                (row.qemu[request], "#bbbbbb"),
                (row.ours[request], "#1f6fb2"),
            ];
            for (at, (time, colour)) in both.into_iter().enumerate() {
                let top = y + BAR * at as f64 + 2.0;
                let length = time * scale;
                let _ = writeln!(
                    svg,
                    "<rect x=\"{LABELS}\" y=\"{top:.0}\" width=\"{length:.1}\" height=\"{:.0}\" \
                     fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{:.0}\">{:.1}</text>",
                    BAR - 1.0,
                    LABELS + length + 4.0,
                    top + BAR - 2.0,
                    time / 1e3
                );
            }
            y += GROUP;
        }
    }
    svg.push_str("</svg>\n");
    svg
}
