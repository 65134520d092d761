// The tests' one main. The tests themselves are dev/test/test_*.cpp, linked with it; doctest's options are its own
// (--help). The last line counts test cases: "N passed, N failed, N skipped". A skipped one has printed its reason (see
// skip() in dev/test/test.h). One op of the GPU, checked and timed: dev/bench.cu.
#define DOCTEST_CONFIG_IMPLEMENT
#include "dev/test/test.h"

namespace {

struct Count {
  int passed = 0, failed = 0, skipped = 0;
} count;

// doctest's own summary does not know of a test that finds out, while it runs, that there is nothing to run it on.
struct Counter : doctest::IReporter {
  explicit Counter(const doctest::ContextOptions&) {}
  void test_case_start(const doctest::TestCaseData&) override { gca::test::case_skipped = false; }
  void test_case_end(const doctest::CurrentTestCaseStats& result) override {
    (!result.testCaseSuccess ? count.failed : gca::test::case_skipped ? count.skipped : count.passed)++;
  }
  void report_query(const doctest::QueryData&) override {}
  void test_run_start() override {}
  void test_run_end(const doctest::TestRunStats&) override {}
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_exception(const doctest::TestCaseException&) override {}
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData&) override {}
  void log_message(const doctest::MessageData&) override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}
};
REGISTER_LISTENER("counter", 1, Counter);

}  // namespace

int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  const int status = context.run();
  if (!context.shouldExit())
    gca::print(count.passed, " passed, ", count.failed, " failed, ", count.skipped, " skipped\n");
  return status;
}
