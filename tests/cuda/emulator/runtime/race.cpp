#include "race.h"

#include <algorithm>
#include <memory>
#include <set>
#include <unordered_map>

namespace emulator::race {
namespace {

// What happened last to a byte. A thread's clock counts its barriers; an event is known to a thread
// whose entry for the other one has reached the event's clock.
struct Cell {
  const Site* write_site = nullptr;
  const Site* read_site = nullptr;
  uint32_t write_block = 0, read_block = 0;
  uint32_t write_clock = 0, read_clock = 0;
  int32_t readers = -1;  // index of the clocks of several readers
  uint16_t writer = 0, reader = 0;
  bool written = false, read = false, read_by_several_blocks = false, by_atomic = false;
  bool initialised = false, pending = false;  // of shared memory; pending: cp.async is under way
};

// Four bytes have one cell between them, until an access takes a part of them.
struct Word {
  Cell cells[4];
  bool split = false;
};

constexpr uint64_t kPageWords = 64;
struct Page {
  Word words[kPageWords];
};

struct Detector {
  uint32_t threads = 0, block = 0;
  std::vector<uint32_t> clocks;  // [threads, threads]: what each knows of each
  std::vector<Word> shared;
  std::vector<uint32_t> reader_clocks;  // [.., threads]; 0 where a thread has not read
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
  std::set<std::pair<const Site*, const Site*>> reported;

  uint32_t& clock(uint32_t of, uint32_t about) { return clocks[size_t{of} * threads + about]; }
  uint32_t* readers(int32_t index) { return &reader_clocks[size_t(index) * threads]; }
  int32_t add_readers() {
    reader_clocks.resize(reader_clocks.size() + threads, 0);
    return int32_t(reader_clocks.size() / threads) - 1;
  }
};
Detector detector;

std::string name(const Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line) + ": " + site.instruction;
}

void complain(const Thread& thread, const Site& site, const Site* other, const std::string& text) {
  if (detector.reported.insert({&site, other}).second) report(thread, site, kLaunchFailure, text);
}

bool known(uint32_t thread, uint32_t other, uint32_t clock) {
  return thread == other || detector.clock(thread, other) >= clock;
}

std::string with(const char* what, uint32_t block, uint32_t thread, const Site& site) {
  return std::string(what) + " thread " + std::to_string(thread) + " of block " +
         std::to_string(block) + " at " + name(site);
}

void remember_read(Cell& cell, uint32_t thread, const Site& site) {
  const uint32_t now = detector.clock(thread, thread);
  if (cell.read && cell.read_block != detector.block) {
    cell.read_by_several_blocks = true;
    cell.read = false;
    cell.readers = -1;
  }
  if (cell.readers >= 0) {
    detector.readers(cell.readers)[thread] = now;
  } else if (cell.read && !known(thread, cell.reader, cell.read_clock)) {
    cell.readers = detector.add_readers();
    uint32_t* clocks = detector.readers(cell.readers);
    clocks[cell.reader] = cell.read_clock;
    clocks[thread] = now;
  }
  cell.read = true;
  cell.read_block = detector.block;
  cell.reader = uint16_t(thread);
  cell.read_clock = now;
  cell.read_site = &site;
}

// The reader that this thread does not know of, or -1.
int64_t unknown_reader(const Cell& cell, uint32_t thread) {
  if (!cell.read) return -1;
  if (cell.read_block != detector.block || cell.read_by_several_blocks) return cell.reader;
  if (cell.readers < 0) return known(thread, cell.reader, cell.read_clock) ? -1 : cell.reader;
  const uint32_t* clocks = detector.readers(cell.readers);
  for (uint32_t other = 0; other < detector.threads; ++other) {
    if (clocks[other] && !known(thread, other, clocks[other])) return other;
  }
  return -1;
}

void touch(Cell& cell, const Thread& thread, const Site& site, Access access) {
  const uint32_t index = thread.index;
  const bool atomic = access == Access::atomic;
  if (cell.written && !(atomic && cell.by_atomic)) {
    const bool other_block = cell.write_block != detector.block;
    if (other_block || !known(index, cell.writer, cell.write_clock)) {
      complain(thread, site, cell.write_site,
               with("race: nothing orders this access after the write of", cell.write_block,
                    cell.writer, *cell.write_site));
    }
  }
  if (access == Access::read) {
    remember_read(cell, index, site);
    return;
  }
  const int64_t reader = unknown_reader(cell, index);
  if (reader >= 0) {
    complain(thread, site, cell.read_site,
             with("race: nothing orders this write after the read of", cell.read_block,
                  uint32_t(reader), *cell.read_site));
  }
  cell.read = cell.read_by_several_blocks = false;
  cell.readers = -1;
  cell.written = true;
  cell.by_atomic = atomic;
  cell.writer = uint16_t(index);
  cell.write_block = detector.block;
  cell.write_clock = detector.clock(index, index);
  cell.write_site = &site;
}

void split(Word& word) {
  if (word.split) return;
  word.split = true;
  for (int i = 1; i < 4; ++i) {
    word.cells[i] = word.cells[0];
    // Clocks of a former block say nothing more; the index of a block's own is not to be shared.
    if (word.cells[0].readers < 0 || word.cells[0].read_block != detector.block) continue;
    word.cells[i].readers = detector.add_readers();
    std::copy_n(detector.readers(word.cells[0].readers), detector.threads,
                detector.readers(word.cells[i].readers));
  }
}

// Calls visit for each cell of the bytes, which begin at `offset` from the words' first.
template <class Visit>
void for_cells(Word* words, uint64_t offset, uint32_t bytes, const Visit& visit) {
  for (uint64_t at = offset; at < offset + bytes;) {
    Word& word = words[at / 4];
    if (at % 4 == 0 && at + 4 <= offset + bytes) {
      if (word.split) {
        for (Cell& cell : word.cells) visit(cell);
      } else {
        visit(word.cells[0]);
      }
      at += 4;
    } else {
      split(word);
      visit(word.cells[at % 4]);
      ++at;
    }
  }
}

}  // namespace

void launch_starts(const Launch& launch) {
  detector.threads = launch.block.x * launch.block.y * launch.block.z;
  detector.pages.clear();
  detector.reported.clear();
}

void launch_ends() { detector.pages.clear(); }

void block_starts(const Thread& first) {
  const uint32_t n = detector.threads;
  const Size3 grid = first.launch.grid;
  detector.block = first.ctaid.x + grid.x * (first.ctaid.y + grid.y * first.ctaid.z);
  detector.clocks.assign(size_t{n} * n, 0);
  for (uint32_t i = 0; i < n; ++i) detector.clock(i, i) = 1;
  detector.shared.assign((first.shared_bytes + 3) / 4, Word{});
  detector.reader_clocks.clear();
}

void joined(const Thread& thread, std::vector<uint32_t>& participants) {
  participants.push_back(thread.index);
}

void passed(const std::vector<uint32_t>& participants) {
  const uint32_t n = detector.threads;
  std::vector<uint32_t> all(n, 0);
  for (const uint32_t i : participants) {
    const uint32_t* row = &detector.clock(i, 0);
    for (uint32_t j = 0; j < n; ++j) all[j] = std::max(all[j], row[j]);
  }
  for (const uint32_t i : participants) {
    std::copy(all.begin(), all.end(), &detector.clock(i, 0));
    ++detector.clock(i, i);
  }
}

void shared_access(const Thread& thread, const Site& site, Access access, uint32_t offset,
                   uint32_t bytes) {
  for_cells(detector.shared.data(), offset, bytes, [&](Cell& cell) {
    if (cell.pending) {
      complain(thread, site, cell.write_site,
               "access to shared memory that cp.async has not delivered yet, issued by" +
                   with("", detector.block, cell.writer, *cell.write_site));
    }
    if (access != Access::write && !cell.initialised) {
      complain(
          thread, site, nullptr,
          "read of shared memory that nobody has written, from byte " + std::to_string(offset));
    }
    touch(cell, thread, site, access);
    cell.initialised = true;
  });
}

void global_access(const Thread& thread, const Site& site, Access access, uint64_t address,
                   uint32_t bytes) {
  // Accesses are aligned, so that none crosses a page.
  auto& page = detector.pages[address / (4 * kPageWords)];
  if (!page) page = std::make_unique<Page>();
  for_cells(page->words, address % (4 * kPageWords), bytes,
            [&](Cell& cell) { touch(cell, thread, site, access); });
}

void copy_issued(const Thread& thread, const Copy& copy) {
  for_cells(detector.shared.data(), uint64_t(copy.to - thread.shared), copy.bytes,
            [](Cell& cell) { cell.pending = true; });
}

// The data arrive for the thread that waits, and for others once something orders them after it.
void copy_arrived(const Thread& thread, const Site&, const Copy& copy) {
  for_cells(detector.shared.data(), uint64_t(copy.to - thread.shared), copy.bytes, [&](Cell& cell) {
    cell.pending = false;
    touch(cell, thread, *copy.site, Access::write);
  });
}

}  // namespace emulator::race
