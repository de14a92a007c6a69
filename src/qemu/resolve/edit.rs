//! Changes a configuration file, and keeps its comments.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item, TableLike, Value, value};

use super::ResolveError;

/// The keys that give an endpoint its place.
const PLACES: [&str; 3] = ["address", "range", "port"];

/// A file's text, whose endpoints can be changed.
pub(super) struct EndpointTables(DocumentMut);

impl EndpointTables {
    /// Parses the text. The error is the parser's message.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parsed: Result<DocumentMut, _> = text.parse();
        parsed.map(Self).map_err(|error| error.message().to_owned())
    }

    /// The endpoints that name a device and have no place: their positions, and the IDs.
    pub fn without_address(&mut self) -> Vec<(usize, String)> {
        let tables = self.tables().into_iter().enumerate();
        let id = |table: &dyn TableLike| {
            let is_placed = PLACES.iter().any(|key| table.contains_key(key));
            let id = table.get("device")?.as_str()?;
            (!is_placed).then(|| id.to_owned())
        };
        tables
            .filter_map(|(index, table)| Some((index, id(table)?)))
            .collect()
    }

    /// The socket of QEMU's monitor in the file.
    pub fn qmp(&self) -> Option<PathBuf> {
        self.0.get("qmp")?.as_str().map(PathBuf::from)
    }

    /// Gives the endpoint at this position more keys.
    pub fn insert(&mut self, endpoint: usize, keys: &[(&'static str, String)]) {
        if let Some(table) = self.tables().into_iter().nth(endpoint) {
            for (key, text) in keys {
                table.insert(key, value(text));
            }
        }
    }

    pub fn text(&self) -> String {
        self.0.to_string()
    }

    fn tables(&mut self) -> Vec<&mut dyn TableLike> {
        match self.0.get_mut("endpoint") {
            Some(Item::ArrayOfTables(tables)) => tables
                .iter_mut()
                .map(|table| table as &mut dyn TableLike)
                .collect(),
            Some(Item::Value(Value::Array(values))) => values
                .iter_mut()
                .filter_map(|value| Some(value.as_inline_table_mut()? as &mut dyn TableLike))
                .collect(),
            _ => Vec::new(),
        }
    }
}

/// Replaces the content of `file` by `text`, with the same owner and mode. A reader sees the old content or the new one.
/// If `file` is a symbolic link, the file to which it leads is replaced.
///
/// # Errors
/// The file's folder cannot be written, or the file's owner cannot be kept.
pub fn replace(file: &Path, text: &str) -> Result<(), ResolveError> {
    write(file, text).map_err(|source| ResolveError::Write {
        file: file.to_owned(),
        source,
    })
}

fn write(file: &Path, text: &str) -> io::Result<()> {
    let file = fs::canonicalize(file)?;
    let before = fs::metadata(&file)?;
    let folder = file.parent().unwrap_or(Path::new("/"));
    let mut draft = tempfile::Builder::new()
        .prefix(".")
        .suffix(".new")
        .tempfile_in(folder)?;
    draft.write_all(text.as_bytes())?;
    let owner = draft.as_file().metadata()?;
    if (owner.uid(), owner.gid()) != (before.uid(), before.gid()) {
        fchown(draft.as_file(), Some(before.uid()), Some(before.gid()))?;
    }
    // Only now may others read it, because a file can have a VF token.
    draft.as_file().set_permissions(before.permissions())?;
    draft.as_file().sync_all()?;
    draft.persist(&file).map_err(|failed| failed.error)?;
    File::open(folder)?.sync_all()
}
