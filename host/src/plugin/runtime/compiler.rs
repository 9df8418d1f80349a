//! Where plugins are compiled: in a child process with a budget of CPU time and memory.
//!
//! A valid file of one megabyte can keep a compiler busy for minutes and take gigabytes. A child
//! can be stopped, which a thread cannot, and returns its memory to the system. It is this
//! executable with a hidden command: it reads the file from standard input and writes machine code
//! to standard output, so that no other process can put code in between. It lowers its own priority
//! once it has worked for a moment ([`PROMPT`]), and ends with its parent.
//!
//! At most [`Compiler::n_turns`] files are compiled at the same time; the others wait their turn. A
//! compilation ends early when nothing waits for its result any more. Without an executable that
//! knows the command (a program that embeds the library, such as a test), a thread compiles; one
//! that exceeds its time is abandoned, and counts as a turn until it ends.
//!
//! What is compiled, and the checks before and after it, are in `compile`.

use std::collections::HashMap;
use std::io::{self, Read, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, Signal};
use rustix::time::{ClockId, clock_gettime};
use wasmtime::component::Component;

use super::cache::{Cache, Key, MAX_FILE_BYTES, revive};
use super::error::LoadError;
use super::layout::MemoryLayout;
use super::log::printable;
use super::thread::lower_thread_priority;
use super::translate::translate;
use crate::duration;
use crate::telemetry::metrics::{Metrics, PluginCompilationLabel};

/// The CPU time after which a compilation gets the lowest priority. A plugin written in Rust
/// compiles within it, also on a busy machine; a larger one must not slow down live events.
const PROMPT: Duration = Duration::from_millis(250);
/// The time on the clock, as a multiple of the CPU time, after which a compilation that gets no
/// processor is refused.
const PATIENCE: u32 = 10;
/// How often a compilation checks its budget and whether its result is still wanted.
const CHECK_EVERY: Duration = Duration::from_millis(20);
/// Threads that compile the functions of one file: more would only take more memory.
const MAX_THREADS: usize = 4;
const MIB: u64 = 1024 * 1024;

/// Exit codes of the child. On success it has written code, otherwise the reason.
const EXIT_REFUSED: u8 = 1;
const EXIT_TIME: u8 = 3;

/// What compiling one file may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompileBudget {
    /// CPU time of all threads together.
    pub time: Duration,
    /// Address space of the process that compiles, in MiB.
    pub memory_mib: u32,
}

impl Default for CompileBudget {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(120),
            memory_mib: 2_048,
        }
    }
}

/// Who compiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompileIn {
    /// This executable, in a process of its own: its `main` must call [`compile_as_child`] for the
    /// arguments `compile-plugin ...`.
    ChildProcess,
    /// A thread of this process. A file that exceeds its time cannot be stopped, and memory is not
    /// limited.
    #[default]
    Thread,
}

/// A handle that is cheap to clone.
#[derive(Clone)]
pub(super) struct Compiler(Arc<Shared>);

struct Shared {
    place: CompileIn,
    layout: MemoryLayout,
    budget: Mutex<CompileBudget>,
    /// By the hash of the file: two requests for the same file share one compilation.
    under_way: Mutex<HashMap<String, Weak<Job>>>,
    /// The turns left.
    turns: Mutex<usize>,
    turn_returned: Condvar,
    metrics: Metrics,
}

/// A compilation under way or finished. It is stopped when the last handle is dropped, and its
/// result is kept as long as there is one.
#[derive(Clone)]
pub(in crate::plugin) struct Compilation(Arc<Job>);

struct Job {
    outcome: Mutex<Option<Outcome>>,
    has_ended: Condvar,
}

type Outcome = Result<Code, LoadError>;

/// Compiled code, ready to be instantiated.
#[derive(Clone)]
pub(super) struct Code {
    pub(super) component: Component,
    /// How long compiling took; `None`: it came from the cache.
    pub(super) time: Option<Duration>,
}

impl std::fmt::Debug for Compilation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compilation")
            .field("has_ended", &self.has_ended())
            .finish_non_exhaustive()
    }
}

impl Compilation {
    pub(in crate::plugin) fn has_ended(&self) -> bool {
        lock(&self.0.outcome).is_some()
    }

    /// Waits until the compilation has ended, at most until `deadline`.
    pub(in crate::plugin) fn wait_until(&self, deadline: Instant) {
        let mut outcome = lock(&self.0.outcome);
        while outcome.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.0.has_ended.wait_timeout(outcome, left);
            outcome = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the compilation has ended.
    pub(in crate::plugin) fn wait(&self) {
        drop(self.ended());
    }

    /// As [`Compilation::wait`], with the result. The time is that of the first caller: for the
    /// others, nothing was compiled.
    pub(super) fn outcome(&self) -> Outcome {
        let mut outcome = self.ended();
        let Some(ended) = outcome.as_mut() else {
            return Err(LoadError::of_host("was not compiled"));
        };
        let first = ended.clone();
        if let Ok(code) = ended {
            code.time = None;
        }
        first
    }

    fn ended(&self) -> MutexGuard<'_, Option<Outcome>> {
        let mut outcome = lock(&self.0.outcome);
        while outcome.is_none() {
            let waited = self.0.has_ended.wait(outcome);
            outcome = waited.unwrap_or_else(PoisonError::into_inner);
        }
        outcome
    }
}

impl Compiler {
    pub(super) fn new(
        place: CompileIn,
        layout: MemoryLayout,
        budget: CompileBudget,
        metrics: Metrics,
    ) -> Self {
        Self(Arc::new(Shared {
            place,
            layout,
            budget: Mutex::new(budget),
            under_way: Mutex::default(),
            turns: Mutex::new(Self::n_turns()),
            turn_returned: Condvar::new(),
            metrics,
        }))
    }

    /// The maximum number of files that are compiled at the same time. At least two, so that one
    /// slow file does not hold up the others.
    fn n_turns() -> usize {
        n_processors().clamp(2, 4)
    }

    pub(super) fn set_budget(&self, budget: CompileBudget) {
        *lock(&self.0.budget) = budget;
    }

    /// Begins to compile a file, unless it is being compiled already. `key`: where the code is
    /// kept.
    pub(super) fn begin(
        &self,
        engine: &wasmtime::Engine,
        cache: Option<(Cache, Key)>,
        hash: &str,
        bytes: &[u8],
    ) -> Compilation {
        let mut under_way = lock(&self.0.under_way);
        under_way.retain(|_, job| job.strong_count() > 0);
        if let Some(job) = under_way.get(hash).and_then(Weak::upgrade) {
            return Compilation(job);
        }
        let job = Arc::new(Job {
            outcome: Mutex::default(),
            has_ended: Condvar::new(),
        });
        under_way.insert(hash.to_owned(), Arc::downgrade(&job));
        drop(under_way);
        let run = Run {
            compiler: self.clone(),
            engine: engine.clone(),
            hash: hash.to_owned(),
            job: Arc::clone(&job),
            bytes: bytes.to_vec(),
        };
        let thread = thread::Builder::new().name("plugin-compiler".into());
        if let Err(error) = thread.spawn(move || run.run(cache)) {
            job.end(Err(LoadError::of_host(format!(
                "was not compiled, because no thread can be started: {error}"
            ))));
        }
        Compilation(job)
    }

    fn count(&self, outcome: &'static str) {
        let label = PluginCompilationLabel { outcome };
        self.0
            .metrics
            .plugin_compilations
            .get_or_create(&label)
            .inc();
    }

    /// Waits for a turn. `None`: the result is not wanted any more.
    fn turn(&self, is_wanted: impl Fn() -> bool) -> Option<Turn> {
        let mut turns = lock(&self.0.turns);
        while *turns == 0 {
            if !is_wanted() {
                return None;
            }
            let waited = self.0.turn_returned.wait_timeout(turns, CHECK_EVERY);
            turns = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *turns -= 1;
        Some(Turn(self.clone()))
    }
}

impl Job {
    fn end(&self, outcome: Outcome) {
        *lock(&self.outcome) = Some(outcome);
        self.has_ended.notify_all();
    }
}

/// A place among those that compile at the same time.
struct Turn(Compiler);

impl Drop for Turn {
    fn drop(&mut self) {
        *lock(&self.0.0.turns) += 1;
        self.0.0.turn_returned.notify_all();
    }
}

/// Why there is no code.
enum Stop {
    /// The text continues a sentence that begins with the file name.
    Refused(String),
    /// The host lacks something.
    Host(String),
    Time,
    Memory,
    Cancelled,
}

/// One compilation, on a thread of its own.
struct Run {
    compiler: Compiler,
    engine: wasmtime::Engine,
    hash: String,
    job: Arc<Job>,
    bytes: Vec<u8>,
}

impl Run {
    fn run(mut self, cache: Option<(Cache, Key)>) {
        let budget = *lock(&self.compiler.0.budget);
        let cached = cache
            .as_ref()
            .and_then(|(cache, key)| cache.take(&self.engine, key));
        if let Some(component) = cached {
            let time = None;
            return self.job.end(Ok(Code { component, time }));
        }
        let code = match self.compiler.turn(|| self.is_wanted()) {
            Some(turn) => self.compile(budget, turn),
            None => Err(Stop::Cancelled),
        };
        let (outcome, word) = match code {
            Ok((code, time)) => match revive(&self.engine, &code) {
                Ok(component) => {
                    if let Some((cache, key)) = cache {
                        cache.put(&key, &code);
                    }
                    let time = Some(time);
                    (Ok(Code { component, time }), "compiled")
                }
                Err(error) => (
                    Err(LoadError::of_host(format!(
                        "was compiled, but its code cannot be loaded: {error:#}"
                    ))),
                    "failed",
                ),
            },
            Err(stop) => stop.outcome(budget),
        };
        self.compiler.count(word);
        self.job.end(outcome);
    }

    /// Whether anything but this thread still waits for the result. If not, the compilation is
    /// forgotten in the same step, so that a new request begins a new one.
    fn is_wanted(&self) -> bool {
        let mut under_way = lock(&self.compiler.0.under_way);
        if Arc::strong_count(&self.job) > 1 {
            return true;
        }
        under_way.remove(&self.hash);
        false
    }

    /// Returns the code and the time on the clock that it took.
    fn compile(&mut self, budget: CompileBudget, turn: Turn) -> Result<(Vec<u8>, Duration), Stop> {
        let began = Instant::now();
        let code = match self.compiler.0.place {
            CompileIn::ChildProcess => match self.child(budget) {
                Ok(child) => self.watch(child, budget),
                Err(error) => Err(Stop::Host(format!(
                    "was not compiled, because no process can be started: {error}"
                ))),
            },
            CompileIn::Thread => self.compile_in_thread(budget, turn),
        };
        code.map(|code| (code, began.elapsed()))
    }

    fn child(&self, budget: CompileBudget) -> io::Result<Child> {
        // Not the path: the file may have been replaced since this process started.
        let mut command = Command::new("/proc/self/exe");
        let layout = self.compiler.0.layout.word();
        command
            .arg("compile-plugin")
            .arg(budget.time.as_millis().to_string())
            .arg(budget.memory_mib.to_string())
            .arg(layout);
        // The child reads untrusted bytes and needs none of the keys that may be here.
        command
            .env_clear()
            .env(
                "RAYON_NUM_THREADS",
                n_processors().min(MAX_THREADS).to_string(),
            )
            // Each arena of the allocator reserves address space, which the budget counts.
            .env("MALLOC_ARENA_MAX", MAX_THREADS.to_string())
            // Its priority is lowered for the whole group at once.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    }

    /// Hands the file to a child and takes its answer, within the budget.
    fn watch(&mut self, mut child: Child, budget: CompileBudget) -> Result<Vec<u8>, Stop> {
        let (mut stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let deadline = Instant::now() + budget.time * PATIENCE;
        let bytes = std::mem::take(&mut self.bytes);
        let (answer, messages, stop) = thread::scope(|scope| {
            scope.spawn(move || {
                // A child that has ended reports the reason itself.
                if let Some(stdin) = &mut stdin {
                    drop(stdin.write_all(&(bytes.len() as u64).to_le_bytes()));
                    drop(stdin.write_all(&bytes));
                }
                drop(stdin);
            });
            let messages = scope.spawn(move || read(stderr, 64 * 1024));
            let (send, answered) = channel();
            scope.spawn(move || drop(send.send(read(stdout, MAX_FILE_BYTES + 1))));
            let mut stop = None;
            let answer = loop {
                match answered.recv_timeout(CHECK_EVERY) {
                    Ok(answer) => break answer,
                    Err(RecvTimeoutError::Disconnected) => break Vec::new(),
                    Err(RecvTimeoutError::Timeout) if stop.is_some() => {}
                    Err(RecvTimeoutError::Timeout) => {
                        if Instant::now() > deadline {
                            stop = Some(Stop::Time);
                        } else if !self.is_wanted() {
                            stop = Some(Stop::Cancelled);
                        }
                        if stop.is_some() {
                            // Fails only if it has ended already.
                            drop(child.kill());
                        }
                    }
                }
            };
            (answer, messages.join().unwrap_or_default(), stop)
        });
        // It may have closed its output early and still run.
        drop(child.kill());
        let status = child
            .wait()
            .map_err(|e| Stop::Host(format!("was not compiled: {e}")))?;
        match stop {
            Some(stop) => Err(stop),
            None => judge(status, answer, &messages),
        }
    }

    fn compile_in_thread(&mut self, budget: CompileBudget, turn: Turn) -> Result<Vec<u8>, Stop> {
        let (send, answered) = channel();
        let (engine, bytes) = (self.engine.clone(), std::mem::take(&mut self.bytes));
        let compile = move || {
            // An abandoned thread keeps its turn until it ends.
            let _turn = turn;
            lower_thread_priority();
            drop(send.send(translate(&engine, &bytes)));
        };
        thread::Builder::new()
            .name("plugin-compiler".into())
            .spawn(compile)
            .map_err(|e| Stop::Host(format!("was not compiled: {e}")))?;
        let deadline = Instant::now() + budget.time;
        loop {
            match answered.recv_timeout(CHECK_EVERY) {
                Ok(code) => return code.map_err(Stop::Refused),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Stop::Refused("made the compiler panic".to_owned()));
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                    return Err(Stop::Time);
                }
                Err(RecvTimeoutError::Timeout) if !self.is_wanted() => {
                    return Err(Stop::Cancelled);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Stop {
    /// The outcome and its label in the metric.
    fn outcome(self, budget: CompileBudget) -> (Outcome, &'static str) {
        let simplify = "split its largest function, or";
        match self {
            Self::Refused(reason) => (Err(LoadError::of_file(reason)), "refused"),
            Self::Host(reason) => (Err(LoadError::of_host(reason)), "failed"),
            Self::Time => {
                let reason = format!(
                    "takes more than {} of CPU time to compile; {simplify} raise plugins.compile_timeout",
                    duration::format(budget.time)
                );
                (Err(LoadError::of_file(reason)), "timeout")
            }
            Self::Memory => {
                let reason = format!(
                    "takes more than {} MiB of memory to compile; {simplify} raise plugins.compile_memory_mib",
                    budget.memory_mib
                );
                (Err(LoadError::of_file(reason)), "memory")
            }
            Self::Cancelled => {
                let reason = "was not compiled, because it was replaced meanwhile";
                (Err(LoadError::of_host(reason)), "cancelled")
            }
        }
    }
}

/// Turns the end of a child into code or a reason.
fn judge(status: ExitStatus, answer: Vec<u8>, messages: &[u8]) -> Result<Vec<u8>, Stop> {
    let messages = String::from_utf8_lossy(messages);
    match (status.code(), status.signal()) {
        (Some(0), _) if answer.len() as u64 <= MAX_FILE_BYTES => return Ok(answer),
        (Some(0), _) => {
            return Err(Stop::Refused(format!(
                "compiles to more than {} MiB of code; remove what it does not need",
                MAX_FILE_BYTES / MIB
            )));
        }
        (Some(code), _) if code == i32::from(EXIT_REFUSED) => {
            return Err(Stop::Refused(printable(&String::from_utf8_lossy(&answer))));
        }
        (Some(code), _) if code == i32::from(EXIT_TIME) => return Err(Stop::Time),
        (_, Some(signal)) if signal == Signal::XCPU.as_raw() => return Err(Stop::Time),
        _ => {}
    }
    // Both the allocator of Rust and the system's functions end the process with one of these.
    let is_memory = [
        "memory allocation of",
        "Cannot allocate memory",
        "OutOfMemory",
    ]
    .iter()
    .any(|text| messages.contains(text));
    if is_memory {
        return Err(Stop::Memory);
    }
    // The kernel kills a process with this signal when the machine or the container has no memory.
    if status.signal() == Some(Signal::KILL.as_raw()) {
        return Err(Stop::Host(
            "was not compiled, because the system killed the compiler, probably for want of memory"
                .to_owned(),
        ));
    }
    let last = messages.lines().rfind(|line| !line.trim().is_empty());
    Err(Stop::Refused(format!(
        "makes the compiler fail ({status}): {}",
        printable(last.unwrap_or("without a message"))
    )))
}

/// Reads at most `max` bytes, and discards the rest so that the writer is not blocked.
fn read(from: Option<impl Read>, max: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut from) = from {
        // What arrived before an error is judged by the child's exit code.
        drop((&mut from).take(max).read_to_end(&mut bytes));
        drop(io::copy(&mut from, &mut io::sink()));
    }
    bytes
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under these locks is one assignment, so a panic leaves nothing inconsistent.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn n_processors() -> usize {
    thread::available_parallelism().map_or(2, usize::from)
}

/// The child's side: reads a file from standard input, writes its code or the reason to standard
/// output, and returns the exit code. `layout`: as the parent's engine.
///
/// Must be the only work of its process: it limits the memory and the priority of the process, and
/// ends it when the budget is spent.
pub fn compile_as_child(budget: CompileBudget, layout: MemoryLayout) -> u8 {
    let (code, exit) = match compile_within(budget, layout) {
        Ok(code) => (code, 0),
        Err(reason) => (reason.into_bytes(), EXIT_REFUSED),
    };
    let mut stdout = io::stdout().lock();
    match stdout.write_all(&code).and_then(|()| stdout.flush()) {
        Ok(()) => exit,
        // The parent is gone.
        Err(_) => EXIT_REFUSED,
    }
}

fn compile_within(budget: CompileBudget, layout: MemoryLayout) -> Result<Vec<u8>, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        format!("was not compiled, because {what} failed: {error}")
    };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| failed("prctl", &e))?;
    limit(Resource::As, u64::from(budget.memory_mib) * MIB).map_err(|e| failed("setrlimit", &e))?;
    limit(Resource::Core, 0).map_err(|e| failed("setrlimit", &e))?;
    // Only for a thread below that does not run; that one is exact.
    limit(Resource::Cpu, budget.time.as_secs() + 2).map_err(|e| failed("setrlimit", &e))?;
    thread::Builder::new()
        .name("budget".into())
        .spawn(move || keep_within(budget.time))
        .map_err(|e| failed("a thread", &e))?;
    let mut stdin = io::stdin().lock();
    let mut length = [0; 8];
    let mut bytes = Vec::new();
    stdin
        .read_exact(&mut length)
        .and_then(|()| stdin.read_to_end(&mut bytes))
        .map_err(|e| failed("reading it", &e))?;
    if bytes.len() as u64 != u64::from_le_bytes(length) {
        return Err("was not compiled, because its parent process ended".to_owned());
    }
    let engine = layout
        .compiling_engine()
        .map_err(|e| failed("the engine", &e))?;
    translate(&engine, &bytes)
}

/// Sets a limit, unless there is a lower one.
fn limit(resource: Resource, value: u64) -> rustix::io::Result<()> {
    let maximum = rustix::process::getrlimit(resource).maximum;
    let value = maximum.map_or(value, |maximum| maximum.min(value));
    let limit = Rlimit {
        current: Some(value),
        maximum: Some(value),
    };
    rustix::process::setrlimit(resource, limit)
}

/// Lowers the priority of this process after a moment, and ends it when its CPU time or its parent
/// is gone.
fn keep_within(time: Duration) {
    let parent = rustix::process::getppid();
    let mut is_lowered = false;
    loop {
        thread::sleep(CHECK_EVERY);
        let used = clock_gettime(ClockId::ProcessCPUTime);
        let used = Duration::new(
            used.tv_sec.unsigned_abs(),
            used.tv_nsec.unsigned_abs() as u32,
        );
        if used >= time {
            std::process::exit(EXIT_TIME.into());
        }
        // Where the system cannot signal the death of the parent.
        if rustix::process::getppid() != parent {
            std::process::exit(EXIT_REFUSED.into());
        }
        if used >= PROMPT.min(time) && !is_lowered {
            is_lowered = true;
            // Of all threads; the parent gave this process a group of its own. If it fails, the
            // compilation only competes with live events.
            rustix::process::setpriority_pgrp(None, 19).ok();
        }
    }
}
