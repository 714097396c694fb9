//! The cores that a shard is bound to.

use integration_tests::LoneShard;

/// The cores that this test may use, as a cpulist.
fn allowed() -> String {
    let status = std::fs::read_to_string("/proc/self/status").expect("a /proc");
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.expect("the system says which cores may be used").trim().to_owned()
}

#[test]
fn all_threads_of_a_shard_are_bound_to_the_cores_that_it_is_given() {
    let allowed = allowed();
    let last = allowed.rsplit([',', '-']).next().expect("a core");
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("shard-0");
    let flags = ["--cores", last, "--num-threads", "2", "--device", "cpu"];
    let shard = LoneShard::start("llama", &socket, &flags);
    let cores = shard.threads_with("kernels-1", "Cpus_allowed_list");
    assert!(cores.len() >= 3, "main thread, engine and a second thread for computing: {cores:?}");
    assert!(cores.iter().all(|cores| cores == last), "{last} of {allowed}: {cores:?}");
}

#[test]
fn a_shard_without_cores_of_its_own_may_use_all() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("shard-0");
    let shard = LoneShard::start("llama", &socket, &["--num-threads", "2", "--device", "cpu"]);
    let cores = shard.threads_with("kernels-1", "Cpus_allowed_list");
    assert!(cores.iter().all(|cores| *cores == allowed()), "{cores:?}");
}
