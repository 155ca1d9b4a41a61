// Runs the instructions of Intel's matrix unit (AMX) on a CPU that has none: each of them raises
// SIGILL, whose handler reads the very bytes of the instruction, does what they say with a twin's
// registers and goes on behind it. So the assembly of tile_unit.h is tested on any x86-64.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "tile_twin.h"

namespace amx_emulator {

using Registers = pshare::Twin<1>;  // other ones than those of the twin that is compared with

struct Instruction {
  const uint8_t* next;  // behind what has been read
  const greg_t* general;
  uint8_t prefix, opcode, mod, reg, rm, second_source;
  uint8_t extend_index, extend_base;  // 8 or 0

  uint64_t value(int number) const {
    static constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                      REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                      REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(general[order[number]]);
  }

  // False if it is none with a three-byte VEX prefix of the map 0F38.
  bool decode(const uint8_t* at, const greg_t* registers) {
    general = registers;
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) return false;
    extend_index = at[1] & 0x40 ? 0 : 8;
    extend_base = at[1] & 0x20 ? 0 : 8;
    second_source = ~(at[2] >> 3) & 0xf;
    prefix = at[2] & 3;
    opcode = at[3];
    mod = at[4] >> 6, reg = at[4] >> 3 & 7, rm = at[4] & 7;
    next = at + 5;
    return true;
  }

  int64_t displacement(int bytes) {
    int32_t wide = 0;
    if (bytes == 1) wide = static_cast<int8_t>(*next);
    if (bytes == 4) std::memcpy(&wide, next, 4);
    next += bytes;
    return wide;
  }

  // Of the first row, and the step from row to row.
  char* address(int64_t* stride) {
    uint64_t base = 0;
    int bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    *stride = 0;
    if (rm == 4) {
      uint8_t sib = *next++;
      int index = (sib >> 3 & 7) | extend_index;
      if (index != 4) *stride = static_cast<int64_t>(value(index) << (sib >> 6));
      if ((sib & 7) == 5 && mod == 0) bytes = 4;
      else base = value((sib & 7) | extend_base);
    } else if (rm == 5 && mod == 0) {
      bytes = 4;
      base = reinterpret_cast<uint64_t>(next + 4);
    } else {
      base = value(rm | extend_base);
    }
    return reinterpret_cast<char*>(base + static_cast<uint64_t>(displacement(bytes)));
  }

  bool run() {
    enum { none, p66, f3, f2 };
    int64_t stride;
    if (opcode == 0x49 && mod == 3) {
      if (prefix == none && reg == 0 && rm == 0) return Registers::release(), true;
      if (prefix == f2 && rm == 0) return Registers::zero(reg), true;
    } else if (opcode == 0x49 && prefix == none && reg == 0) {
      char* at = address(&stride);  // where an index register would be one of the address
      pshare::TileConfig config(1, 1);
      std::memcpy(&config, at + stride, sizeof(config));
      return Registers::configure(config), true;
    } else if (opcode == 0x4b && mod != 3 && rm == 4) {
      char* at = address(&stride);
      if (prefix == f2) return Registers::load(reg, at, stride), true;
      if (prefix == f3) return Registers::store(reg, at, stride), true;
    } else if (opcode == 0x5c && mod == 3 && prefix == f3) {
      return Registers::dot(reg, rm, second_source), true;
    }
    return false;
  }
};

inline long& count() {
  static long instructions = 0;
  return instructions;
}

inline void handle(int, siginfo_t*, void* context) {
  greg_t* general = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction instruction;
  if (!instruction.decode(reinterpret_cast<const uint8_t*>(general[REG_RIP]), general) ||
      !instruction.run()) {
    std::abort();
  }
  count()++;
  general[REG_RIP] = reinterpret_cast<greg_t>(instruction.next);
}

// From now on; SIGILL is as it was when the object ends.
class Installed {
 public:
  Installed() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, &before_);
  }
  ~Installed() { sigaction(SIGILL, &before_, nullptr); }

 private:
  struct sigaction before_;
};

}  // namespace amx_emulator
